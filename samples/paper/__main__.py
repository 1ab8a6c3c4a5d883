"""The paper's tables and figures: ``python -m samples.paper table1 table3 --scale cpu``.

Each run adds a line to ``SCALE.jsonl`` in ``--results``; runs that stand there are not made again, so that tables
share them and an interrupted series goes on. Then the tables (Markdown) and figures (SVG) are made of what is there.

Scales: ``smoke`` (seconds), ``power`` (small networks, 20 seeds, hours on two cores), ``cpu`` (two cores, minutes to
an hour a table), ``gpu`` (the same data in full and the paper's ResNet-32, on one GPU), ``paper`` (CIFAR and ImageNet
as the paper has them; see ``scales.py``).
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import track

from samples.paper import power_report, report
from samples.paper.experiments import EXPERIMENTS
from samples.paper.power import POWER
from samples.paper.runs import Row, Run, carry_out, checkpoint_of, one_thread
from samples.paper.scales import DATA, SCALES
from samples.training.lines import append, read

ALL = EXPERIMENTS | POWER
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that are missing, then the tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=f"{', '.join(ALL)}; default: all")
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="where data sets are")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="keep unfinished runs there, epoch by epoch")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each with a thread of its own")
    parser.add_argument("--report", action="store_true", help="only tables and figures, of what is there")
    options = parser.parse_args(arguments)
    known = [name for name, experiment in ALL.items() if experiment.role in SCALES[options.scale]]
    names = options.experiments or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no experiment {', '.join(unknown)} at this scale: there are {', '.join(known)}")
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{options.scale}.jsonl"
    if not options.report:
        done = {row["key"] for row in read(file)}
        runs = {run.key: run for name in names for run in ALL[name].runs(options.scale)}
        missing = sorted((run for key, run in runs.items() if key not in done), key=lambda run: run.seed)
        _carry_out(missing, file, options)
    if options.scale == "power":
        power_report.write(read(file), options.results)
    else:
        report.write(read(file), options.scale, options.results)


def _carry_out(runs: list[Run], file: Path, options: argparse.Namespace) -> None:
    results = _results(runs, options)
    console = Console(stderr=True)
    failed = []
    for run, row in track(results, total=len(runs), console=console, description=f"{len(runs)} runs"):
        what = f"{run.method.name}, noise {run.noise:.0%}, seed {run.seed}"
        if isinstance(row, Exception):
            failed.append(row)
            console.print(f"{what}: FAILED, {type(row).__name__}: {row}")
            continue
        append(file, row)
        if options.checkpoints:
            checkpoint_of(run, options.checkpoints).unlink(missing_ok=True)
        console.print(f"{what}: error {row['error']:.2%}, {row['seconds']:.0f} s")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed; the others are written, and won't be made again")


def _results(runs: list[Run], options: argparse.Namespace) -> Iterator[tuple[Run, Row | Exception]]:
    """As they come; one that fails doesn't stop the others."""
    for data in {run.setting.data for run in runs}:
        DATA[data](options.data)  # downloaded once
    arguments = options.data, options.checkpoints
    spawn = multiprocessing.get_context("spawn")
    if options.processes == 1:
        for run in runs:
            try:
                yield run, carry_out(run, *arguments)
            except Exception as error:
                yield run, error
        return
    with ProcessPoolExecutor(options.processes, spawn, one_thread) as pool:
        jobs = {pool.submit(carry_out, run, *arguments): run for run in runs}
        for job in as_completed(jobs):
            error = job.exception()
            yield jobs[job], error if isinstance(error, Exception) else job.result()


if __name__ == "__main__":
    main()
