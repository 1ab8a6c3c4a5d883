"""Compiled: functions that a compiler takes whole into the graph around them, or leaves alone.

Where `torch.compile` can't take a call, it compiles pieces of the function that was called, as if they stood alone:
some of its statements would take a compiler for what they run under, and others not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from fxcollab._torch import dynamo_is_loaded, never_compile

P = ParamSpec("P")
R = TypeVar("R")


def whole(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` as it is under a compiler that takes all of it; never compiled otherwise, nor what it calls.

    Its code has to be handed to `leave_alone` before a compiler comes to it.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not dynamo_is_loaded():
            return function(*args, **kwargs)
        found: R = _uncompiled(function)(*args, **kwargs)
        return found

    return call


_CODE = whole(lambda: None).__code__


@cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return made


def leave_alone() -> None:
    """Keep compilers from calls of `whole` functions that they can't take into the graph around them."""
    never_compile(_CODE)
