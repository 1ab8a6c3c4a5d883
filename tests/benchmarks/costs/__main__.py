"""Predicted costs against built graphs: ``python -m tests.benchmarks.costs [counts] [process] [paper]``.

- ``counts``: every network and head tree of `tests.benchmarks.proof`; FLOPs against ``FlopCounterMode``, for the
  hierarchical tree the peak of memory against ``MemTracker``, both on the built training graph, on fake tensors.
- ``process``: by how much the process grows in a real step, in a process of its own.
- ``paper``: table 4 of the paper beside the calculation.

A line a case goes to ``costs.jsonl`` in ``--results``; cases that stand there are not measured again unless
``--again`` is said.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import torch

from tests.benchmarks.costs import counts, paper, process
from tests.benchmarks.rows import measured

PARTS = {"counts": counts, "process": process, "paper": paper}
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run the parts that are named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--again", action="store_true", help="measure what stands in the results, too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    file = arguments.results / "costs.jsonl"
    said = []
    for name in arguments.parts or PARTS:
        part = PARTS[name]
        rows = measured(file, name, part.cases(), part.measure, again=arguments.again)
        said.append(f"{name}: {part.conclusion(rows)}")
    print("\n" + "\n".join(said))


if __name__ == "__main__":
    main()
