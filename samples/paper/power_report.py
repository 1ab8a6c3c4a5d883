"""The report of the scale ``power``: gains with intervals, a sentence a claim, error beside cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from scipy.stats import spearmanr

import fxcollab
from samples.networks.small import ConvNet
from samples.paper.methods import SINGLE, Method, Tree
from samples.paper.paired import Gain, gain, told_apart
from samples.paper.plots import error_beside_cost, gains_by_noise
from samples.paper.power import POWER
from samples.paper.runs import Row

SIDES = {"digits, 1,000": 8, "Fashion-MNIST, 1,000 halved": 14}
"""Of the images, in pixels."""


@dataclass(frozen=True)
class Claim:
    """What the paper says, as a comparison of two methods.

    Attributes:
        sentence: the claim.
        experiment: a name of `POWER`.
        better, worse: names of its methods.
    """

    sentence: str
    experiment: str
    better: str
    worse: str


CLAIMS = (
    Claim("Two instances that learn from each other beat one (table 1)", "claims", "2 instances", "single instance"),
    Claim("Four instances beat two (table 1)", "claims", "4 instances", "2 instances"),
    Claim("Two heads over shared layers beat one network (table 1)", "claims", "2 heads, simple", "single instance"),
    Claim("Two heads beat two instances (table 1)", "claims", "2 heads, simple", "2 instances"),
    Claim("A tree of four heads beats one network (table 1)", "claims", "4 heads, hierarchical", "single instance"),
    Claim("A tree of four heads beats two heads (table 1)", "claims", "4 heads, hierarchical", "2 heads, simple"),
    Claim("A tree of four heads beats four instances (table 1)", "claims", "4 heads, hierarchical", "4 instances"),
    Claim("Label smoothing beats plain training", "claims", "label smoothing (0.1)", "single instance"),
    Claim("A tree beats label smoothing (table 4)", "claims", "4 heads, hierarchical", "label smoothing (0.1)"),
    Claim("A tree beats distillation from two (table 4)", "claims", "4 heads, hierarchical", "distilled from 2"),
    Claim(
        "Simultaneous updates beat alternating ones (table 2)",
        "updates",
        "2 instances, T = 1",
        "2 instances, alternating, T = 1",
    ),
    Claim("T = 2 beats T = 1 (table 2)", "updates", "2 instances", "2 instances, T = 1"),
    *(
        Claim(f"With {heads} heads rescaling beats {other} (table 3)", "scaling", f"{heads} heads, rescaled", worse)
        for heads in (4, 8, 16)
        for other, worse in (
            ("no scaling", f"{heads} heads, no scaling"),
            ("scaling the loss", f"{heads} heads, loss scaling"),
        )
    ),
)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write ``power.md`` and the pictures beside it."""
    by_key = {row["key"]: row for row in rows}
    found = {
        name: [by_key[run.key] for run in experiment.runs("power") if run.key in by_key]
        for name, experiment in POWER.items()
    }
    lines = ["# The paper's claims with many seeds", "", *_preface(rows), "", *_claims(found)]
    lines += _figure3(found["claims"], folder)
    lines += _scaling(found["scaling"])
    for name, experiment in POWER.items():
        for (data, noise), part in _settings(found[name]).items():
            lines += ["", f"## {experiment.title}: {data}, {noise:.0%} of the labels wrong", ""]
            lines += _gains(experiment.methods, part)
            if name == "fixed":
                lines += ["", "Stopped at the epoch with the fewest errors on held-out samples:", ""]
                lines += _gains(experiment.methods, [row | row["stopped"] for row in part])
            if name == "trees":
                lines += _costs(experiment.methods, part, data, folder)
    (folder / "power.md").write_text("\n".join(lines) + "\n")


def _preface(rows: Sequence[Row]) -> Iterator[str]:
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for row in rows})
    yield f"Made by `python -m samples.paper --scale power` of {len(rows)} runs ({'; '.join(machines)})."
    yield "Errors are those of head 0 after the last epoch, in percent. Gains are paired by seed: head 0 starts with"
    yield "the same weights, and sees the same batches. In brackets stands the 95 % interval of the mean gain (by"
    yield "Student's t); bold gains are told from chance when all of a table are asked together (Holm)."
    yield "One recipe was set for all rows before the first run; nothing is chosen on the test set, no seed left out."


def _settings(rows: Sequence[Row]) -> Mapping[tuple[str, float], list[Row]]:
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row["data"], row["noise"]), []).append(row)
    return dict(sorted(found.items()))


def _of(rows: Sequence[Row], method: str) -> list[Row]:
    return [row for row in rows if row["method"] == method]


def _claims(found: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """A line a claim and setting, with a verdict."""
    asked: list[tuple[Claim, str, float, Gain]] = []
    for claim in CLAIMS:
        for (data, noise), rows in _settings(found[claim.experiment]).items():
            difference = gain(_of(rows, claim.better), _of(rows, claim.worse))
            if difference:
                asked.append((claim, data, noise, difference))
    yield "| claim | data | wrong labels | gain | t | seeds | |"
    yield f"|{'---|' * 7}"
    told = told_apart([difference for *_, difference in asked])
    for (claim, data, noise, difference), apart in zip(asked, told, strict=True):
        verdict = ("agrees" if difference.mean > 0 else "disagrees") if apart else "can't be told"
        cells = claim.sentence, data, f"{noise:.0%}", str(difference), f"{difference.t:.1f}", str(difference.seeds)
        yield f"| {' | '.join(cells)} | {verdict} |"


def _figure3(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """A picture for each data set that has three levels of noise or more."""
    settings = _settings(rows)
    for data in dict.fromkeys(data for data, _ in settings):
        gains: dict[str, list[tuple[float, Gain]]] = {}
        for (of, noise), part in settings.items():
            base = _of(part, SINGLE.name)
            for method in POWER["claims"].methods[1:] if of == data else ():
                if found := gain(_of(part, method.name), base):
                    gains.setdefault(method.name, []).append((noise, found))
        if gains and min(map(len, gains.values())) > 2:
            name = f"noise-{data.split(',')[0].lower().replace(' ', '-')}"
            yield from ("", f"## Gain over one network by label noise: {data} (figure 3)")
            yield from _picture(name, f"Gains by label noise on {data}", partial(gains_by_noise, gains), folder)


def _scaling(rows: Sequence[Row]) -> Iterator[str]:
    """From how many heads on rescaling is told from no scaling (table 3)."""
    for (data, noise), part in _settings(rows).items():
        heads = (4, 8, 16)
        gains = [gain(_of(part, f"{h} heads, rescaled"), _of(part, f"{h} heads, no scaling")) for h in heads]
        known = [(h, found) for h, found in zip(heads, gains, strict=True) if found]
        told = [h for (h, _), apart in zip(known, told_apart([found for _, found in known]), strict=True) if apart]
        said = f"with {', '.join(map(str, told))} heads" if told else f"with up to {max(heads)} heads not at all"
        text = "; ".join(f"{h} heads {found}" for h, found in known)
        yield from (
            "",
            f"{data}, {noise:.0%} of the labels wrong: rescaling is told from no scaling {said} ({text}).",
        )


def _picture(name: str, says: str, drawn: Callable[[str], str], folder: Path) -> Iterator[str]:
    """A picture in both themes, and what shows it."""
    for theme in ("light", "dark"):
        (folder / f"{name}-{theme}.svg").write_text(drawn(theme))
    yield ""
    yield f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">'
    yield f'<img alt="{says}" src="{name}-light.svg"></picture>'
    yield ""


def _gains(methods: Sequence[Method], rows: Sequence[Row]) -> Iterator[str]:
    """Errors of every method, and gains over the first."""
    base = _of(rows, methods[0].name)
    gains = {method.name: gain(_of(rows, method.name), base) for method in methods[1:]}
    known = [found for found in gains.values() if found]
    told = dict(zip(map(id, known), told_apart(known), strict=True))
    yield "| | error | gain | t | other heads | ensemble | seeds |"
    yield f"|{'---|' * 7}"
    for method in methods:
        runs = _of(rows, method.name)
        if not runs:
            continue
        found = gains.get(method.name)
        text = "" if found is None else f"**{found}**" if told[id(found)] else str(found)
        others = [error for row in runs for error in row["errors of heads"][1:]]
        cells = (
            method.name,
            _mean([row["error"] for row in runs]),
            text,
            "" if found is None else f"{found.t:.1f}",
            _mean(others),
            _mean([row["error of the ensemble"] for row in runs]),
            str(len(runs)),
        )
        yield f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.2f}" if values else ""


def _costs(methods: Sequence[Method], rows: Sequence[Row], data: str, folder: Path) -> Iterator[str]:
    """Gains beside the cost of a step, a picture of both, and what the objective of ``auto`` would have said."""
    base, points = _of(rows, methods[0].name), []
    for method in methods:
        found = gain(_of(rows, method.name), base)
        if isinstance(method, Tree) and found:
            points.append((method, found, *_cost(method, SIDES[data])))
    if len(points) < 3:
        return
    name = f"trees-{data.split(',')[0].lower()}"
    beside = [(m.name, costs.time, found) for m, found, costs, _ in points]
    yield from _picture(
        name, "Gain over one network beside the cost of a step", partial(error_beside_cost, beside), folder
    )
    yield "| tree | FLOPs of a step | its peak of memory | gain | evenness |"
    yield f"|{'---|' * 5}"
    for method, found, costs, evenness in sorted(points, key=lambda point: point[2].time):
        yield f"| {method.name} | {costs.time:.2f}x | {costs.memory:.2f}x | {found} | {evenness:.2f} |"
    rank = spearmanr([evenness for *_, evenness in points], [found.mean for _, found, *_ in points])
    cost = spearmanr([costs.time for *_, costs, _ in points], [found.mean for _, found, *_ in points])
    yield ""
    yield f"Rank correlation of the gain with the objective of `auto` (evenness): {rank.statistic:+.2f}; with the"
    yield f"FLOPs of a step: {cost.statistic:+.2f} ({len(points)} trees)."


@cache
def _cost(tree: Tree, side: int) -> tuple[fxcollab.Costs, float]:
    """The costs of a step, and the objective by which ``splits="auto"`` ranks trees."""
    image = (torch.zeros(64, 1, side, side),)
    costs = fxcollab.training_costs(ConvNet, tree.pattern or "", tree.splits, tree.heads, tree.fanouts, image)
    candidates = {found.name: found for found in fxcollab.find_splits(ConvNet, image)}
    option = fxcollab.Option(tuple(candidates[split] for split in tree.splits), (), costs.time)
    return costs, fxcollab.evenness(option)
