"""The measured figures in the documents, made from the rows that the measurements left.

python -m samples.guides.figures    # writes them into README.md and the guides, between "made:" and "end"
"""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fxcollab
from samples.networks.small import ConvNet
from samples.paper.experiments import EXPERIMENTS
from samples.paper.methods import SINGLE, Tree
from samples.paper.paired import gain
from samples.paper.power import POWER
from samples.paper.power_report import SIDES
from samples.semi_supervised import WAYS
from tests.benchmarks.speed.memory import CASES

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "tests/benchmarks/results"
PAPER = ROOT / "samples/paper/results"
LEAST_SEEDS = 5
"""Of a tree, before its gain stands in the table."""
Row = Mapping[str, Any]


@cache
def rows(file: Path) -> Sequence[Row]:
    """A measurement's rows."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def guarantees() -> str:
    """What `verify` shows, and on how many models it did."""
    proofs = rows(MEASURED / "proof.jsonl")
    differences = [float(row["gradients"].rpartition(" ")[2]) for row in proofs]
    structure = Counter((row["name"].partition(":")[0], row["result"]) for row in rows(MEASURED / "zoo.jsonl"))
    values = Counter((row["name"].partition(":")[0], row["result"]) for row in rows(MEASURED / "zoo_values.jsonl"))

    def of(counter: Counter[tuple[str, str]], library: str) -> str:
        return f"{counter[library, 'ok']:,} of {sum(n for (name, _), n in counter.items() if name == library):,}"

    assert {result for _, result in structure} <= {"ok", "refused", "error"}  # an error is a model that can't be made
    cases, networks = sum(row["ok"] for row in proofs), len({row["network"] for row in proofs})
    trees, worst = len({row["tree"] for row in proofs}), max(differences)
    return _list(
        "1. **You get your model back:** what `prune` returns has your model's operations, node for node, for every "
        f"head: in {of(structure, 'timm')} models of timm, {of(structure, 'torchvision')} of torchvision, "
        f"{of(structure, 'transformers')} classifiers of transformers. None came back changed.",
        "2. **Outputs are exact:** a head computes, bit for bit, what your model does with that head's weights.",
        "3. **Gradients are means:** the loss is a sum, and what heads share gets the mean of the gradients that "
        "each sends, so that learning rates need no change. It holds in "
        f"{cases} of {len(proofs)} cases ({networks} networks, {trees} head trees each), up to {worst:.0e} in "
        "float64.",
        "4. **Your model stays as it is** until you train; where `transform` refuses it, the error says what helps.",
        f"5. **Check it:** `fxcollab verify` tests all this on your model. It holds for {of(values, 'timm')} models "
        f"of timm (the smallest of every kind, with weights) and {of(values, 'transformers')} of transformers; why "
        "not for others is in [zoo.md](tests/benchmarks/results/zoo.md).",
    )


def _list(*items: str) -> str:
    """Items of a list, in lines of a usual length."""
    return "".join(
        textwrap.fill(
            item, 126, subsequent_indent=" " * (item.index(" ") + 1), break_on_hyphens=False, break_long_words=False
        )
        + "\n"
        for item in items
    )


def _error(row: Row) -> float:
    return float(row["error"])


def _study(network: str, noise: float) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows(PAPER / "cpu.jsonl"):
        if (row["network"].partition(",")[0], row["noise"]) == (network, noise):
            found.setdefault(row["method"], []).append(row)
    return found


def _gained(found: Mapping[str, Sequence[Row]], method: str, base: str = "single instance") -> tuple[float, float]:
    """The mean gain over another method in points, seed by seed, and its standard deviation."""
    errors = {row["seed"]: _error(row) for row in found[base]}
    differences = [100 * (errors[row["seed"]] - _error(row)) for row in found[method] if row["seed"] in errors]
    return statistics.fmean(differences), statistics.stdev(differences)


PATTERNS = ("2 instances", "2 heads, simple", "4 heads, hierarchical")


def when() -> str:
    """Where it helped and where it did not, in our own runs."""
    noisy, clean, larger = _study("ResNet-8", 0.4), _study("ResNet-8", 0.0), _study("ResNet-14", 0.0)
    costs = [row for row in rows(MEASURED / "costs.jsonl") if row["part"] == "paper"]
    times = [float(row["FLOPs"]) for row in costs]
    paper = {name: float(error.split()[0]) for name, error in EXPERIMENTS["table4"].paper["ResNet-50"].items()}
    found = [paper[SINGLE.name] - paper[method] for method in PATTERNS]
    published = f"{min(found):.1f} to {max(found):.1f}"

    def span(found: Mapping[str, Sequence[Row]]) -> str:
        gains = sorted((*_gained(found, method), method) for method in PATTERNS)
        return " to ".join(f"{mean:.1f} ± {spread:.1f} ({method})" for mean, spread, method in (gains[0], gains[-1]))

    def alone(found: Mapping[str, Sequence[Row]]) -> str:
        return f"{100 * statistics.fmean(map(_error, found['single instance'])):.1f} %"

    return _list(
        "- **Use it** where inference must not cost more and some labels are wrong: with 40 % wrong ones, drawn anew "
        f"every epoch, the gain on a small network's error of {alone(noisy)} is {span(noisy)} points (± over seeds: "
        "a gain below its ± can't be told from none). Try stopping early first: it costs nothing.",
        f"- **Expect little** on clean data: {span(clean)} points at {alone(clean)} error with few images, "
        f"{span(larger)} at {alone(larger)} with more and a larger network ([all]"
        f"(samples/paper/results/README.md)); the paper has {published} on ImageNet.",
        "- **Don't use it** where time to train is what you lack: a step of ResNet-50 costs "
        f"{min(times):.1f} to {max(times):.1f} times a plain one's operations.",
    )


def costs() -> str:
    """What a step costs by tree, ResNet-50, beside the gains that were measured."""
    noisy, larger = _study("ResNet-8", 0.4), _study("ResNet-14", 0.0)
    lines = ["| heads of ResNet-50 | operations | memory, batch 64 | gain, clean | gain, 40 % wrong labels |"]
    lines.append(f"|{'---|' * 5}")
    for row in rows(MEASURED / "costs.jsonl"):
        if row["part"] != "paper":
            continue
        [name] = row["case"]
        gains = ["{:+.2f} ± {:.2f}".format(*_gained(found, name)) for found in (larger, noisy)]
        lines.append(f"| {name} | {row['FLOPs']:.2f}x | {row['memory, batch 64']:.2f}x | {' | '.join(gains)} |")
    return "\n".join(lines) + "\n"


def trees() -> str:
    """Error beside the cost of a step, tree by tree, at the scale ``power``; nothing before there are enough runs."""
    experiment, done = POWER["trees"], {row["key"]: row for row in rows(PAPER / "power.jsonl")}
    runs = list(experiment.runs("power"))
    found: dict[tuple[str, str], list[Row]] = {}
    for run in runs:
        if run.key in done:
            found.setdefault((run.setting.data, run.method.name), []).append(done[run.key])
    lines = []
    for data in dict.fromkeys(run.setting.data for run in runs):
        base = found.get((data, experiment.methods[0].name), ())
        for method in experiment.methods:
            mine = found.get((data, method.name), ())
            if isinstance(method, Tree) and len(mine) >= LEAST_SEEDS and (gained := gain(mine, base)):
                side = SIDES[data]
                step = fxcollab.training_costs(
                    ConvNet, method.pattern or "", method.splits, method.heads, method.fanouts,
                    (torch.zeros(64, 1, side, side),),
                )  # fmt: skip
                lines.append((data, step.time, f"| {method.name} | {data} | {step.time:.2f}x | {gained} |"))
    if not lines:
        return "How the place of the splits changes the gain is not measured yet.\n"
    table = [line for *_, line in sorted(lines)]
    told = "Of trees on small networks, with twenty seeds (`python -m samples.paper trees --scale power`):"
    return "\n".join([told, "", "| tree | data | operations | gain in points |", "|---|---|---|---|", *table]) + "\n"


def memory() -> str:
    """What ``recompute`` saves, and what prediction of memory is worth."""
    found = {row["case"][0]: row for row in rows(MEASURED / "speed.jsonl") if row["part"] == "memory"}
    differences = [abs(row["difference"]) for row in rows(MEASURED / "costs.jsonl") if "memory built" in row]
    lines = ['| four heads of | plain | `recompute="heads"` |', "|---|---|---|"]
    for name, row in found.items():
        memory = f"{row['memory of the plain graph']:.2f}x | {row['memory']:.2f}x"
        lines.append(f"| {name}, batch {CASES[name][0]} | {memory} |")
    lines += ["", "Peaks of memory of a step without an optimizer, as ratios to the single network's. What is"]
    lines += [
        f"predicted before anything is built is within {max(differences):.1%} of what torch's `MemTracker` finds"
    ]
    lines += ["on the graph that is."]
    return "\n".join(lines) + "\n"


def labels() -> str:
    """Learning from images without labels."""
    found = rows(ROOT / "samples/semi_supervised.jsonl")
    lines = ["| heads learn from | error | gain |", "|---|---|---|"]
    for way in WAYS:
        differences = [100 * (row[WAYS[0]] - row[way]) for row in found]
        gained = (
            f"{statistics.fmean(differences):.1f} ± {statistics.stdev(differences):.1f}" if any(differences) else ""
        )
        lines.append(f"| {way} | {100 * statistics.fmean(row[way] for row in found):.1f} % | {gained} |")
    return "\n".join([*lines, "", f"Points of {len(found)} seeds: mean and standard deviation."]) + "\n"


FIGURES: Mapping[str, Callable[[], str]] = {
    made.__name__: made for made in (guarantees, when, costs, trees, memory, labels)
}


def filled(document: str) -> str:
    """A document with its figures as they are now."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{FIGURES[match[2]]()}{match[3]}"

    return re.sub(r"(<!-- made: (\w+) -->)\n.*?(<!-- end -->)", fill, document, flags=re.S)


if __name__ == "__main__":
    for file in (ROOT / "README.md", *sorted(Path(__file__).parent.glob("*.md"))):
        file.write_text(filled(file.read_text()))
