"""Figures 3 and 4, and gains beside noise and cost, as SVG."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from samples.paper.paired import Gain
from samples.paper.runs import HISTOGRAM, Row

mpl.rcParams["svg.hashsalt"] = "fxcollab"  # the same file twice


def errors_by_noise(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Error of head 0 over the level of noise, a line a method, with the spread over seeds (figure 3)."""
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    levels = sorted({row["noise"] for row in rows})
    for method in methods:
        by_level = [[100 * r["error"] for r in rows if r["method"] == method and r["noise"] == n] for n in levels]
        found = [(100 * level, errors) for level, errors in zip(levels, by_level, strict=True) if errors]
        if found:
            means = [statistics.fmean(errors) for _, errors in found]
            spreads = [statistics.stdev(errors) if len(errors) > 1 else 0.0 for _, errors in found]
            axes.errorbar([level for level, _ in found], means, spreads, marker="o", capsize=3, label=method)
    axes.set(xlabel="corrupted labels (%)", ylabel="test error of head 0 (%)")
    axes.legend()
    axes.grid(alpha=0.3)
    return _svg(figure)


def error_beside_cost(points: Sequence[tuple[str, float, Gain]], theme: str) -> str:
    """The gain of every tree over the FLOPs of its step, with its interval; the best up to each cost are named."""
    colours = dict(zip(("instances", "heads", "(", "ladder"), _COLOURS, strict=False))
    figure, axes, ink = _themed(theme)
    best = float("-inf")
    for name, cost, gain in sorted(points, key=lambda point: (point[1], -point[2].mean)):
        colour = next(colours[kind] for kind in colours if kind in name)
        axes.errorbar(
            cost, gain.mean, [[gain.mean - gain.low], [gain.high - gain.mean]], marker="o", color=colour, capsize=2
        )
        if gain.mean > best:
            best = gain.mean
            axes.annotate(
                name, (cost, gain.high), (0, 4), textcoords="offset points", color=ink, fontsize=8, ha="center"
            )
    axes.set_xlabel("FLOPs of a training step, as a multiple of one network's", color=ink)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    return _svg(figure)


def gains_by_noise(gains: Mapping[str, Sequence[tuple[float, Gain]]], theme: str) -> str:
    """Every method's gain over the level of noise, with its interval and its name at the end of its line."""
    figure, axes, ink = _themed(theme)
    ends = []
    for place, (method, points) in enumerate(gains.items()):
        colour, shift = (
            _COLOURS[place % len(_COLOURS)],
            0.6 * (place - len(gains) / 2),
        )  # so that intervals stand apart
        levels, means = [100 * noise + shift for noise, _ in points], [gain.mean for _, gain in points]
        around = [[g.mean - g.low for _, g in points], [g.high - g.mean for _, g in points]]
        axes.errorbar(levels, means, around, marker="o", color=colour, capsize=2, linewidth=1.2)
        ends.append((means[-1], levels[-1], method, colour))
    low, high = axes.get_ylim()
    at = float("-inf")
    for mean, level, method, colour in sorted(ends):
        at = max(mean, at + 0.045 * (high - low))  # names stand below one another
        axes.annotate(
            method, (level, mean), (level + 4, at), color=colour, fontsize=9, va="center", annotation_clip=False
        )
    axes.set_xlim(right=axes.get_xlim()[1] * 1.35)
    axes.set_xticks([100 * noise for noise, _ in max(gains.values(), key=len)])
    axes.set_xlabel("wrong labels (%)", color=ink)
    return _svg(figure)


_COLOURS = ("#3b82f6", "#10b981", "#d97706", "#a855f7", "#e11d48", "#0891b2", "#84860b")


def _themed(theme: str) -> tuple[Figure, Axes, str]:
    """A figure of gains, its axes and the colour of its text."""
    ink, back = ("#1f2328", "#ffffff") if theme == "light" else ("#e6edf3", "#0d1117")
    figure = Figure((8, 5), layout="constrained", facecolor=back)
    axes = figure.subplots()
    axes.set_facecolor(back)
    for side in axes.spines.values():
        side.set_color(ink)
    axes.tick_params(colors=ink)
    axes.set_ylabel("gain in points of error", color=ink)
    axes.axhline(0, color=ink, linewidth=0.6)
    axes.grid(alpha=0.2, color=ink)
    return figure, axes, ink


def weights_by_layer(rows: Sequence[Row]) -> str:
    """Histograms of every layer's weights, a row of plots a layer and a line a method (figure 4)."""
    layers = list(rows[0]["weights"])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = 3
    figure = Figure((10, 2.2 * -(-len(layers) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(layers) // columns), columns, squeeze=False)
    low, high, bins = HISTOGRAM
    middles = np.linspace(low, high, bins + 1)[:-1] + (high - low) / bins / 2
    for axes, layer in zip(grid.flat, layers, strict=False):
        for method in methods:
            counts = sum(np.array(r["weights"][layer]["histogram"]) for r in rows if r["method"] == method)
            axes.plot(middles, counts / counts.sum(), label=method, linewidth=1)
        axes.set_title(layer, fontsize=8)
        axes.tick_params(labelsize=6)
    for axes in list(grid.flat)[len(layers) :]:
        axes.set_axis_off()
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    return _svg(figure)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
