"""Ctrl-C while a model is captured leaves torch and the user's modules as they were."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.interrupts import deferred_interrupts
from fxcollab.tracing import user_globals


def press() -> None:
    signal.raise_signal(signal.SIGINT)


class Pressed(nn.Module):
    """Ctrl-C is pressed in its forward, so many times, between two operations that are counted."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.stem, self.last, self.times, self.done = nn.Linear(4, 4), nn.Linear(4, 2), times, []

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            press()
            REACHED.append("after a press")
        x = self.last(x)
        REACHED.append("after an operation")
        return x


REACHED: list[str] = []


def is_as_it_was() -> bool:
    """Whether torch and builtins are themselves, here and in what was imported."""
    names = ["torch", "isinstance", "len", "type", "getattr", "hasattr", "callable"]
    held = [vars(module).get(name) for module in list(sys.modules.values()) for name in names if module]
    stand_ins = [value for value in held if "fxcollab" in str(type(value).__module__) + str(value)]
    fxcollab.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))  # still works
    return not stand_ins and type(torch.ones(2)) is Tensor


@pytest.fixture(autouse=True)
def handler() -> Any:
    """As in an interactive session."""
    REACHED.clear()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.parametrize("function", [fxcollab.transform, fxcollab.capture])
def test_a_capture_that_is_interrupted_ends_at_the_next_operation(function: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        function(Pressed(), splits=["stem"])
    assert REACHED == ["after a press"] and is_as_it_was()


def test_a_second_interrupt_does_not_wait_for_an_operation() -> None:
    with pytest.raises(KeyboardInterrupt):
        fxcollab.transform(Pressed(2), splits=["stem"])
    assert REACHED == ["after a press"] and is_as_it_was()


@pytest.mark.parametrize("call", range(2))
def test_an_interrupt_while_names_are_patched_waits_until_they_are_restored(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, find = [0], user_globals.loaded_scopes

    def pressed(*args: Any, **options: Any) -> Any:
        if seen[0] == call:
            press()
        seen[0] += 1
        return find(*args, **options)

    monkeypatch.setattr(user_globals, "loaded_scopes", pressed)
    with pytest.raises(KeyboardInterrupt):
        fxcollab.transform(Pressed(0), splits=["stem"])
    assert is_as_it_was()


def test_an_error_meanwhile_does_not_hide_the_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, deferred_interrupts():
        press()
        raise ValueError("inside")
    assert isinstance(caught.value.__context__, ValueError)


def test_other_threads_leave_the_handler_alone() -> None:
    found: list[Any] = []

    def look() -> None:
        with deferred_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
