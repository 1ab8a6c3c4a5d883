"""Results as JSON lines, one a case, written as they come: an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Case = tuple[str, ...]


def read(file: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measured(
    file: Path, part: str, cases: Iterable[Case], measure: Callable[..., Row], *, again: bool = False
) -> list[Row]:
    """The row of every case: read from the file where it stands there, else measured, printed and added.

    Args:
        file: of JSON lines.
        part: the part of the benchmark; other parts may stand in the same file.
        cases: the arguments of ``measure``, one tuple a case.
        measure: gives the row of a case.
        again: measure all of them anew.
    """
    cases = list(cases)
    rows = read(file)
    if again:
        rows = [row for row in rows if row["part"] != part]
        file.write_text("".join(map(_line, rows)))
    known = {tuple(row["case"]): row for row in rows if row["part"] == part}
    return [known.get(case) or _new(file, part, case, measure) for case in cases]


def _new(file: Path, part: str, case: Case, measure: Callable[..., Row]) -> Row:
    machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    row = {"part": part, "case": list(case), **measure(*case), **machine}
    with file.open("a") as output:
        output.write(_line(row))
    print("  ".join(_shown(row)), flush=True)
    return row


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _shown(row: Row) -> Iterator[str]:
    for key, value in row.items():
        if key not in ("torch", "machine", "threads"):
            yield " ".join(value) if key == "case" else f"{key} {value}"
