"""Limits far above use: what a damaged or hostile file asks for must not take all time or memory."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import SupportsIndex

from fxcollab.errors import LimitError

MOST_HEADS = 4096
MOST_LEVELS = 64
MOST_NAME = 10_000
"""Characters in the name of a split, of an input or of the peers."""
MOST_ELEMENTS = 1 << 27
_MOST_DIMENSIONS = 64
_MOST_VALUES = 1000
_CGROUP = Path("/sys/fs/cgroup")


def check_count(count: int, most: int, what: str, hint: str) -> None:
    """Raise a `LimitError` where there is more of something than is ever needed."""
    if count > most:
        raise LimitError(f"{number(count)} {what} are too many.", why=f"at most {most:,} are taken", hint=hint)


def check_name(name: str, of: str) -> None:
    """Raise a `LimitError` for a name longer than any that is needed."""
    check_count(len(name), MOST_NAME, f"characters in the name of {of}", "give a shorter one")


def number(count: int) -> str:
    """A number as text, however many digits it has."""
    return f"{count:,}" if count < 10**15 else "10 to the 15th or more"


def check_seed(seed: SupportsIndex) -> int:
    """The seed as an int; a `LimitError` for one that torch's generators don't take."""
    if not -(1 << 63) <= (value := operator.index(seed)) < 1 << 64:
        raise LimitError("The seed is too large.", why="seeds have 64 bits", hint="give one below 2**63")
    return value


def check_optimizer(values: float) -> None:
    """Raise a `LimitError` for a number of values for each parameter that no optimizer keeps."""
    if not 0 <= values <= _MOST_VALUES:
        raise LimitError(
            f"An optimizer keeps {values} values for each trained one.",
            why=f"it is a number from 0 to {_MOST_VALUES}",
            hint="give 1 for SGD with momentum, 2 for Adam (--optimizer 2)",
        )


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Raise a `LimitError` for an example input that no memory holds, `ValueError` for sizes below zero."""
    if any(isinstance(size, bool) or size < 0 for size in shape):
        raise ValueError(f"input {name!r} has the shape {list(shape)}")
    check_count(len(shape), _MOST_DIMENSIONS, f"dimensions of input {name!r}", "give a smaller example")
    values = math.prod(max(size, 1) for size in shape)  # of none, torch multiplies the other sizes all the same
    check_count(values, MOST_ELEMENTS, f"values of input {name!r}", "give a smaller example")


def check_memory(needed: int, what: str, hint: str) -> None:
    """Raise a `LimitError` where memory isn't enough, as far as the system says what it has."""
    free = available_memory()
    if free is not None and needed > free:
        raise LimitError(
            f"There is not enough memory for {what}.",
            why=f"it needs {needed / 1e9:,.1f} GB, and there are {free / 1e9:,.1f} GB",
            hint=hint,
        )


def available_memory() -> int | None:
    """Bytes that may be had before others must be given up: of the machine, and of the process's group."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        [line] = [x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:")]
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used)
    with suppress(AttributeError, OSError, ValueError):
        if not found:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)
