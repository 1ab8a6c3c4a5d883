"""Choices: ``python -m tests.benchmarks.choice``.

What ``splits="auto"`` takes for thirty models of torchvision and timm, and why; which budgets are kept, by the costs
of the graph that the choice leads to; what it takes for networks that no single value cuts well, proved; how long the
search takes beside the capture, on timm's largest models and on graphs of up to 10,000 nodes. A line a case goes to
``choice.jsonl`` in ``--results``; cases that stand there are not measured again unless ``--again`` is said.
``choice.md`` is made of them.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.benchmarks.choice import picks, scale, wide
from tests.benchmarks.rows import Row, measured

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run both parts and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure what stands in the results, too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    file, again = arguments.results / "choice.jsonl", arguments.again
    picked = measured(file, "picks", ((name,) for name in picks.MODELS), picks.pick, again=again)
    searched = measured(file, "searches", ((name,) for name in scale.CASES), scale.search, again=again)
    cut = measured(file, "wide", ((name,) for name in wide.CASES), wide.cut, again=again)
    text = "\n".join([*_markdown(picked, searched), *_of_wide(cut)]) + "\n"
    (arguments.results / "choice.md").write_text(text)
    print(text)


def _markdown(picked: list[Row], searched: list[Row]) -> Iterator[str]:
    yield '# What `splits="auto"` takes'
    yield ""
    yield f"Two splits, no other hint; costs of a training step at batch {picks.BATCH}, as ratios to the original's."
    yield ""
    yield "| model | splits | time | memory | why |"
    yield "|---|---|---|---|---|"
    for row in picked:
        yield f"| {row['case'][0]} | {', '.join(row['splits'])} | {row['time']} | {row['memory']} | {row['why']} |"
    yield ""
    yield "## Under budgets"
    yield ""
    yield f"| model | {' | '.join(picks.BUDGETS)} |"
    yield f"|---|{'---|' * len(picks.BUDGETS)}"
    for row in picked:
        yield f"| {row['case'][0]} | {' | '.join(_within(row['budgets'][name]) for name in picks.BUDGETS)} |"
    kept = [found for row in picked for found in row["budgets"].values()]
    yield ""
    yield (
        f"{sum(found['kept'] is True for found in kept)} of {len(kept)} budgets are kept, "
        f"{sum(found['kept'] is None for found in kept)} can't be; {sum(found['kept'] is False for found in kept)} "
        "are exceeded."
    )
    yield ""
    yield "## The search beside the capture"
    yield ""
    yield "| model | nodes | candidates | capture, s | search, s |"
    yield "|---|---|---|---|---|"
    for row in searched:
        yield f"| {row['case'][0]} | {row['nodes']} | {row['candidates']} | {row['capture']} | {row['search']} |"


def _of_wide(cut: list[Row]) -> Iterator[str]:
    yield ""
    yield "## Networks that no single value cuts well"
    yield ""
    yield "Small models with random weights; how many values cross each cut, and the proof at what is chosen."
    yield ""
    yield "| network | splits | shares of the work | values that cross | proof |"
    yield "|---|---|---|---|---|"
    for row in cut:
        shares = ", ".join(f"{100 * share:.0f} %" for share in row.get("shares", ()))
        crossing = ", ".join(map(str, row.get("crossing", ())))
        yield f"| {row['case'][0]} | {', '.join(row.get('splits', ()))} | {shares} | {crossing} | {row['result']} |"


def _within(found: Row) -> str:
    if found["kept"] is None:
        return f"none: {found['why']}"
    return f"{', '.join(found['splits'])} ({found['time']}x, {found['memory']}x)"


if __name__ == "__main__":
    main()
