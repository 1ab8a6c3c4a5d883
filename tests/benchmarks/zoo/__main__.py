"""Every model of timm, torchvision and transformers' classifiers: ``python -m tests.benchmarks.zoo``.

Each model is captured, transformed (hierarchical, two splits at its own stages) and pruned, on meta tensors. With
``--values N`` the whole proof of `fxcollab.verify` runs on real weights instead: the smallest model of every module
of each library, then the next smallest, N in all for each. ``--others`` does that for all models of further libraries
(``other_libraries.py``), into ``zoo2_values.jsonl``.

One JSON line a model goes to ``zoo.jsonl`` (or ``zoo_values.jsonl``) in ``--results``; models that stand there with
the same version of the passes are skipped, so that an interrupted run goes on. ``--summary`` writes ``zoo.md`` beside
them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

from rich.progress import track

from tests.benchmarks.zoo.models import entries
from tests.benchmarks.zoo.other_libraries import other_entries
from tests.benchmarks.zoo.summary import Row, library_of, summary
from tests.benchmarks.zoo.trial import try_structure, try_values, try_values_in_time
from tests.benchmarks.zoo.version import version

RESULTS = Path(__file__).parents[1] / "results"
STRUCTURE, VALUES, OTHER_VALUES = "zoo.jsonl", "zoo_values.jsonl", "zoo2_values.jsonl"


def main() -> None:
    """Run what is missing, or write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="*", default=["timm", "torchvision", "transformers"])
    parser.add_argument("--only", nargs="*", default=[""], metavar="PART", help="parts of names")
    parser.add_argument("--values", type=int, metavar="N", help="the proof on real weights, for N models a library")
    parser.add_argument("--others", action="store_true", help="the proof on real weights, for further libraries")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--summary", action="store_true", help="only write the summary of what is there")
    arguments = parser.parse_args()
    if not arguments.summary:
        _run(arguments)
    values = [row for name in (VALUES, OTHER_VALUES) for row in _rows(arguments.results / name)]
    text = "\n".join(summary(_rows(arguments.results / STRUCTURE), values))
    (arguments.results / "zoo.md").write_text(text + "\n")
    print(text)


def _run(arguments: argparse.Namespace) -> None:
    file, attempt = arguments.results / STRUCTURE, try_structure
    if arguments.others:
        file, attempt = arguments.results / OTHER_VALUES, try_values_in_time
        names = list(other_entries())
    else:
        structure = _rows(file)
        if arguments.values is not None:
            file, attempt = arguments.results / VALUES, try_values
        names = [name for library in arguments.libraries for name in _chosen(library, arguments.values, structure)]
    done = {row["name"] for row in _rows(file) if row.get("version") == version()}
    chosen = [name for name in names if name not in done and any(part in name for part in arguments.only)]
    with file.open("a") as output:
        for row in track(_results(attempt, chosen, arguments.processes), total=len(chosen)):
            output.write(json.dumps(row | {"version": version()}) + "\n")
            output.flush()
    _sort(file)


def _results(attempt: Callable[[str], Row], names: Sequence[str], processes: int) -> Iterator[Row]:
    """As they come. Workers are replaced now and then: libraries keep what they have built in caches.

    Where one is killed, as for want of memory, those that are left run one after the other, each in a process alone.
    """
    for start in range(0, len(names), _A_WORKERS_SHARE * processes):
        left = dict.fromkeys(names[start : start + _A_WORKERS_SHARE * processes])
        with suppress(BrokenProcessPool), ProcessPoolExecutor(processes, _SPAWN) as pool:
            jobs = {pool.submit(attempt, name): name for name in left}
            for job in as_completed(jobs):
                row = job.result()
                del left[jobs[job]]
                yield row
        yield from (_alone(attempt, name) for name in left)


def _alone(attempt: Callable[[str], Row], name: str) -> Row:
    try:
        with ProcessPoolExecutor(1, _SPAWN) as pool:
            return pool.submit(attempt, name).result()
    except BrokenProcessPool:
        return {"name": name, "result": "error", "why": "the process was killed: for want of memory?"}


_A_WORKERS_SHARE = 40
_SPAWN = multiprocessing.get_context("spawn")


def _chosen(library: str, count: int | None, structure: Sequence[Row]) -> list[str]:
    """All models of a library, or the ``count`` smallest, with the smallest of every module first."""
    if count is None:
        return [name for name, entry in entries().items() if entry.library == library]
    rows = sorted((row for row in structure if library_of(row) == library), key=_size)
    first = reversed(list({row["family"]: row["name"] for row in reversed(rows)}.values()))  # small ones first
    others = sorted(rows, key=lambda row: _size(row) * max(row.get("pixels", 0), 1))
    families = len({row["family"] for row in rows})
    return list(dict.fromkeys([*first, *(row["name"] for row in others)]))[: max(count, families)]


def _size(row: Row) -> int:
    return int(row.get("parameters", 0))


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _sort(file: Path) -> None:
    """The order of the results must not be that of the clock. Of several rows of a model, the last counts."""
    latest = {row["name"]: row for row in _rows(file)}
    rows = sorted(latest.values(), key=lambda row: (library_of(row), row["name"]))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
