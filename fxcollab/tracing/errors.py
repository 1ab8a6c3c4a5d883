"""What ends an attempt to trace a forward."""

from __future__ import annotations

from fxcollab.errors import CaptureError


class UntraceableError(BaseException):
    """The forward does something that can't be recorded in a graph.

    Not an ``Exception``: an ``except Exception`` in the forward must not catch it.
    """


class NoExampleError(UntraceableError):
    """The forward needs something, such as a type, that any example input has, and there is no example yet."""


class FirstCallError(CaptureError):
    """The forward makes parameters that it keeps; no example helps."""
