"""What ends an attempt to trace a forward."""

from __future__ import annotations


class UntraceableError(BaseException):
    """The forward does something that a graph can't hold.

    Not an ``Exception``: a forward's own ``except Exception`` must not take it for an answer.
    """


class NoExampleError(UntraceableError):
    """What any example would tell, such as a type, was asked where there is none."""
