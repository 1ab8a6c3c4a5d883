"""Results as JSON lines, one a case, written as they come: an interrupted run goes on where it stopped."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from samples.training.lines import append, read, write

Row = dict[str, Any]
Case = tuple[str, ...]


def measured(
    file: Path, part: str, cases: Iterable[Case], measure: Callable[..., Row], *, again: bool = False
) -> list[Row]:
    """The row of every case: read from the file where it stands there, else measured, printed and added.

    Args:
        file: of JSON lines.
        part: the part of the benchmark; other parts may stand in the same file.
        cases: the arguments of ``measure``, one tuple a case.
        measure: gives the row of a case.
        again: measure all of them anew; each new row takes the place of the old one.
    """
    known = {} if again else {tuple(row["case"]): row for row in read(file) if row["part"] == part}
    return [known.get(case) or _new(file, part, case, measure) for case in cases]


def _new(file: Path, part: str, case: Case, measure: Callable[..., Row]) -> Row:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    machine = {"torch": torch.__version__, "machine": device, "threads": torch.get_num_threads()}
    row = {"part": part, "case": list(case), **measure(*case), **machine}
    rows = read(file)
    others = [other for other in rows if (other["part"], other["case"]) != (part, row["case"])]
    if len(others) < len(rows):
        write(file, others)
    append(file, row)
    print("  ".join(_shown(row)), flush=True)
    return row


def _shown(row: Row) -> Iterator[str]:
    for key, value in row.items():
        if key not in ("torch", "machine", "threads"):
            yield " ".join(value) if key == "case" else f"{key} {value}"
