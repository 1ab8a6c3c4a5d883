"""Speed: ``python -m tests.benchmarks [loss] [startup] [steps] [memory] [spread] [passes]``.

- ``loss``: the collaborative loss against its equations written head by head, 8 heads, batch 1024, 1000 classes.
- ``startup``: ``fxcollab --help``, and ``fxcollab transform torchvision:resnet50`` beside imports, model and copies.
- ``steps``: training steps against modules written by hand, and against the single network.
- ``memory``: four heads whose branches are computed again, against the single network and the plain graph.
- ``spread``: two ranks with a head each, against the single network in both.
- ``passes``: partition and rewrite against a plain trace; time by nodes, and the most memory beside the peers'.

Read a ratio as how many times faster ours is: the median of pairs that were taken in turns, with the least and the
most. On a machine with a GPU all of it runs there. A line a case goes to ``speed.jsonl`` in ``--results``; cases that
stand there are not measured again unless ``--again`` is said.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.rows import Row, measured
from tests.benchmarks.speed import loss, memory, passes, spread, startup, steps

PARTS = {
    "loss": loss,
    "startup": startup,
    "steps": steps,
    "memory": memory,
    "spread": spread,
    "passes": passes,
}
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run the parts that are named, all unless said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--again", action="store_true", help="measure what stands in the results, too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    for name in arguments.parts or PARTS:
        part = PARTS[name]
        rows = measured(arguments.results / "speed.jsonl", name, part.cases(), part.measure, again=arguments.again)
        Console(width=160).print(_table(name, rows), f"{part.conclusion(rows)}\n")
    print("A ratio says how many times faster ours is: the median of pairs taken in turns, least and most beside it.")


def _table(name: str, rows: list[Row]) -> Table:
    left_out = ("part", "case", "torch", "machine", "threads")
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in left_out))
    machines = {f"{row['machine']}, torch {row['torch']}, {row['threads']} threads" for row in rows}
    table = Table("case", *columns, title=f"{name} ({'; '.join(sorted(machines))})")
    for row in rows:
        table.add_row(" ".join(row["case"]), *(str(row.get(column, "")) for column in columns))
    return table


if __name__ == "__main__":
    main()
