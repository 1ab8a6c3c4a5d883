"""The global random generators: torch's, Python's and numpy's.

They are the process's. Of the library's own calls in several threads, one at a time seeds and restores them.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ONE_AT_A_TIME = threading.RLock()
"""Held where the generators, or functions of torch, are others for a while."""


class ForeignState:
    """The current state of Python's and numpy's global generators."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = _numpy().get_state() if _numpy() else None

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self._python)
        if self._numpy is not None:
            _numpy().set_state(self._numpy)

    def foreign_numbers_were_drawn(self) -> bool:
        """Whether Python's or numpy's generators were drawn from since."""
        if random.getstate() != self._python:
            return True
        return self._numpy is not None and any(map(_differ, _numpy().get_state(), self._numpy))

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context in which the generators begin with this state; afterwards they are restored."""
        now = ForeignState()
        self.restore()
        try:
            yield
        finally:
            now.restore()


class GeneratorState(ForeignState):
    """The current state of all global generators."""

    def __init__(self) -> None:
        super().__init__()
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Set the generators to this state."""
        super().restore()
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)

    def numbers_were_drawn(self) -> bool:
        """Whether any of the generators was drawn from since."""
        now = GeneratorState()
        of_torch = not torch.equal(now._cpu, self._cpu) or any(map(_differ, now._cuda, self._cuda))
        return of_torch or self.foreign_numbers_were_drawn()


@contextmanager
def preserve_rng_state() -> Iterator[GeneratorState]:
    """A context after which the generators are restored; threads take turns."""
    with ONE_AT_A_TIME:
        before = GeneratorState()
        try:
            yield before
        finally:
            before.restore()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which the generators are seeded with ``seed``; afterwards they are restored."""
    with preserve_rng_state():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        if _numpy():
            _numpy().seed(seed % 2**32)
        yield


def _numpy() -> Any:
    """Numpy's module of generators, if numpy is loaded."""
    numpy: Any = sys.modules.get("numpy")
    return numpy.random if numpy else None


def _differ(one: Any, other: Any) -> bool:
    return bool((one != other).any()) if hasattr(one, "any") else one != other
