"""Markdown tables and figures of the runs that are there."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from samples.paper.experiments import EXPERIMENTS, Experiment
from samples.paper.plots import errors_by_noise, weights_by_layer
from samples.paper.runs import Row


def write(rows: Sequence[Row], scale: str, folder: Path) -> None:
    """Write ``SCALE.md`` and the figures beside it.

    Args:
        rows: of the runs at this scale.
        scale: a name of `samples.paper.scales.SCALES`.
        folder: where to.
    """
    by_key = {row["key"]: row for row in rows}
    lines = [f"# The paper's experiments at the scale `{scale}`", "", *_preface(rows)]
    for name, experiment in EXPERIMENTS.items():
        found = [by_key[run.key] for run in experiment.runs(scale) if run.key in by_key]
        if found:
            lines += ["", f"## {name}: {experiment.title}", "", *_section(name, experiment, found, scale, folder)]
    (folder / f"{scale}.md").write_text("\n".join(lines) + "\n")


def _preface(rows: Sequence[Row]) -> Iterator[str]:
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for row in rows})
    yield f"Made by `python -m samples.paper` of {len(rows)} runs ({'; '.join(machines)})."
    yield "Error of head 0 after the last epoch, in percent: mean ± standard deviation over seeds, and how many."
    yield "The other heads and their ensemble stand beside it; nothing is selected on the test set."
    yield "The gain is what the first row's error is higher by, seed by seed; head 0 begins with the same weights."
    yield "Time and memory are a GPU's, as ratios to the first row; runs on CPUs stood beside other load."
    yield "A run repeats exactly on the same kind of CPU; on another, rounding makes it another draw."
    yield "Columns of the paper are of its own data set and network, for the order alone."


def _section(name: str, experiment: Experiment, rows: Sequence[Row], scale: str, folder: Path) -> Iterator[str]:
    if name == "figure3":
        yield from _by_noise(experiment, rows)
        yield from _picture(
            errors_by_noise(rows, [m.name for m in experiment.methods]), f"figure3-{scale}.svg", folder
        )
    elif name == "figure4":
        yield from _by_layer(experiment, rows)
        yield from _picture(weights_by_layer(rows), f"figure4-{scale}.svg", folder)
    else:
        for network in dict.fromkeys(row["network"] for row in rows):
            yield from _by_method(experiment, [row for row in rows if row["network"] == network])


def _by_method(experiment: Experiment, rows: Sequence[Row]) -> Iterator[str]:
    first = rows[0]
    epochs = first["recipe"]["epochs"]
    known = experiment.paper or {}
    of = first["network"] if first["network"] in known else next(iter(known), "")
    yield f"{first['network']} on {first['data']}, {epochs} epochs."
    yield ""
    measured = ["time", "memory"] if any(row["memory"] for row in rows) else []
    columns = ["", "head 0", "gain", "top 5", "other heads", "ensemble", *measured, f"paper, {of}"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    base = [row for row in rows if row["method"] == experiment.methods[0].name]
    for method in experiment.methods:
        runs = [row for row in rows if row["method"] == method.name]
        if not runs:
            continue
        others = [error for row in runs for error in row["errors of heads"][1:]]
        cells = [
            method.name,
            _spread([row["error"] for row in runs]),
            "" if runs == base else _gain(runs, base),
            _spread([row["top5 error"] for row in runs], count=False),
            _spread(others, count=False),
            _spread([row["error of the ensemble"] for row in runs], count=False),
            *(_ratio(runs, base, {"time": "seconds", "memory": "memory"}[column]) for column in measured),
            known.get(of, {}).get(method.name, ""),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _by_noise(experiment: Experiment, rows: Sequence[Row]) -> Iterator[str]:
    levels = sorted({row["noise"] for row in rows})
    yield f"| | {' | '.join(f'{level:.0%} wrong' for level in levels)} |"
    yield f"|---|{'---|' * len(levels)}"
    for method in experiment.methods:
        cells = [
            _spread([row["error"] for row in rows if row["method"] == method.name and row["noise"] == level])
            for level in levels
        ]
        yield f"| {method.name} | {' | '.join(cells)} |"
    yield from ("", f"Gain over {experiment.methods[0].name}:", "")
    yield f"| | {' | '.join(f'{level:.0%} wrong' for level in levels)} |"
    yield f"|---|{'---|' * len(levels)}"
    base = [row for row in rows if row["method"] == experiment.methods[0].name]
    for method in experiment.methods[1:]:
        runs = [row for row in rows if row["method"] == method.name]
        by_level = (
            _gain(*([row for row in part if row["noise"] == level] for part in (runs, base))) for level in levels
        )
        yield f"| {method.name} | {' | '.join(by_level)} |"
    yield ""


def _by_layer(experiment: Experiment, rows: Sequence[Row]) -> Iterator[str]:
    yield "Standard deviation of every layer's weights in the network that is kept, mean over seeds."
    yield ""
    methods = [method.name for method in experiment.methods if any(row["method"] == method.name for row in rows)]
    yield f"| layer | {' | '.join(methods)} |"
    yield f"|---|{'---|' * len(methods)}"
    for layer in rows[0]["weights"]:
        deviations = [
            _mean([row["weights"][layer]["std"] for row in rows if row["method"] == method]) for method in methods
        ]
        yield f"| `{layer}` | {' | '.join(f'{value:.4f}' for value in deviations)} |"
    yield ""


def _picture(svg: str, name: str, folder: Path) -> Iterator[str]:
    (folder / name).write_text(svg)
    yield f"![{name}]({name})"


def _gain(runs: Sequence[Row], base: Sequence[Row]) -> str:
    """What errors of the first row are higher by, over the seeds that both have."""
    before = {row["seed"]: row["error"] for row in base}
    return _spread([before[row["seed"]] - row["error"] for row in runs if row["seed"] in before], sign=True)


def _ratio(runs: Sequence[Row], base: Sequence[Row], key: str) -> str:
    """To the first row of the table; empty where it was not measured."""
    here, there = (_mean([row[key] for row in part if row[key]]) for part in (runs, base))
    return f"{here / there:.2f}x" if here and there else ""


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _spread(values: Sequence[float], *, count: bool = True, sign: bool = False) -> str:
    if not values:
        return ""
    percent = [100 * value for value in values]
    spread = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
    mean = f"{statistics.fmean(percent):{'+' if sign else ''}.2f}"
    return f"{mean}{spread}" + (f" ({len(percent)})" if count else "")
