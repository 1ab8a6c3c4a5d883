"""Files of JSON lines that survive a kill: a line that was not finished is left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file.

    Raises:
        ValueError: a line other than the last is no JSON.
    """
    text = file.read_text() if file.exists() else ""
    whole, _, _ = text.rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put these rows in the place of what is there, all or none."""
    with replacing(file) as opened:
        opened.writelines(f"{json.dumps(row)}\n".encode() for row in rows)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A new file, opened for writing, that takes the place of ``file`` on leaving without an error."""
    beside = file.with_name(f".{file.name}.part")
    beside.unlink(missing_ok=True)  # of a run that was killed; a link is not followed
    with beside.open("xb") as opened:
        yield opened
    beside.replace(file)


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Add a row behind the whole ones."""
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        write(file, read(file))
    with file.open("a") as output:
        output.write(f"{json.dumps(row)}\n")
