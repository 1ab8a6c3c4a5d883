"""Random generators, all that a model may draw from: torch's, Python's and numpy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ForeignState:
    """The state at this moment of the global generators that are not torch's: Python's and numpy's."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = _numpy().get_state() if _numpy() else None

    def restore(self) -> None:
        """Go back to it."""
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
        """Draw from it anew; the generators are put back on leaving."""
        now = ForeignState()
        self.restore()
        try:
            yield
        finally:
            now.restore()


class GeneratorState(ForeignState):
    """The state of all global generators at this moment."""

    def __init__(self) -> None:
        super().__init__()
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Go back to it."""
        super().restore()
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def preserve_rng_state() -> Iterator[GeneratorState]:
    """Put the generators back on leaving."""
    before = GeneratorState()
    try:
        yield before
    finally:
        before.restore()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw as seeded by ``seed``; the generators are put back on leaving."""
    with preserve_rng_state():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        if _numpy():
            _numpy().seed(seed % 2**32)
        yield


def _numpy() -> Any:
    """Numpy's module of generators, where the program has it loaded."""
    numpy: Any = sys.modules.get("numpy")
    return numpy.random if numpy else None


def _differ(one: Any, other: Any) -> bool:
    return bool((one != other).any()) if hasattr(one, "any") else one != other
