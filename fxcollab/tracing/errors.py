"""What ends an attempt to trace a forward."""

from __future__ import annotations

from typing import Any

from fxcollab.errors import CaptureError
from fxcollab.tracing.callers import Place


class UntraceableError(BaseException):
    """The forward does something that can't be recorded in a graph.

    Not an ``Exception``: an ``except Exception`` in the forward must not catch it.
    """


class NoExampleError(UntraceableError):
    """The forward needs something, such as a type, that any example input has, and there is no example yet."""


class IndexAskedError(UntraceableError):
    """The forward, or torch for it, asks a proxy for an index.

    Attributes:
        place: where; see `calling_place`.
    """

    def __init__(self, name: str, place: Place) -> None:
        super().__init__(f"index({name}) can't be known while tracing")
        self.place = place


class DrawnError(UntraceableError):
    """The forward takes a branch by random numbers, so that no example helps."""


class ArgumentError(UntraceableError):
    """An object that the graph can't refer to is an argument of a node.

    Attributes:
        kind: its class; where calls of that are nodes, so is the object.
    """

    def __init__(self, value: Any) -> None:
        super().__init__(
            f"an object of type {type(value).__qualname__} can't be an argument of a node: it is neither an "
            "attribute of a module nor made in the forward by a class that can be imported"
        )
        self.kind = type(value)


class FirstCallError(CaptureError):
    """The forward makes parameters that it keeps; no example helps."""
