"""Predicted costs against built graphs: ``python -m tests.benchmarks.costs [counts] [process] [times] [paper]``.

- ``counts``: every network and head tree of `tests.benchmarks.proof`; FLOPs against ``FlopCounterMode``, for the
  hierarchical tree the peak of memory against ``MemTracker``, both on the built training graph, on fake tensors.
- ``process``: by how much the process grows in a real step, in a process of its own.
- ``times``: the predicted ratio to the original against the measured one, steps of both taken in turns.
- ``paper``: table 4 of the paper beside the calculation.

Results go to ``costs.json`` in ``--results``, each part under its name; a part is replaced when it is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from tests.benchmarks.costs import counts, paper, process, times

PARTS = {"counts": counts, "process": process, "times": times, "paper": paper}
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run the parts that are named, all unless said, and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    file = arguments.results / "costs.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for part in arguments.parts:
        cases = list(PARTS[part].cases())
        rows = [PARTS[part].measure(*case) for case in track(cases, part)]
        machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        results[part] = {**machine, "rows": rows}
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{part}: {PARTS[part].conclusion(rows)}")
        for row in rows:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
