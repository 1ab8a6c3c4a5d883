"""Ctrl-C where it would leave something half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """A context in which Ctrl-C waits for a call of the function that is returned, or for the end.

    It would leave some of the patches of torch that are being made or taken back, or some of the files. A second one
    doesn't wait: the user's code may hang.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    if deferring := getattr(handler, "answer", None):  # inside of another such context
        yield deferring
        return
    pressed: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append((number, frame))
        if len(pressed) > 1:
            answer()

    def answer() -> None:
        if pressed:
            first = pressed[0]
            pressed.clear()
            handler(*first)

    vars(note)["answer"] = answer
    signal.signal(signal.SIGINT, note)
    try:
        yield answer
    finally:
        if signal.getsignal(signal.SIGINT) is note:  # else user code has set another
            signal.signal(signal.SIGINT, handler)
        answer()
