"""Helper functions that can't be traced: calls of them are recorded as one node.

A function such as ``resize_if_needed(x, size)`` needs concrete values, which a proxy doesn't have. As a node it gets
them at every call, so that the graph is right for every input.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import pytree


@dataclass(frozen=True)
class Helper:
    """A module-level function, and where the forward looks it up: the name of a module, and the name in it."""

    function: FunctionType
    scope: str
    name: str

    @property
    def title(self) -> str:
        """The function's full name."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


def is_helper(function: Any) -> bool:
    """Whether it is a Python function of the user's or of a third library."""
    ours = ("torch", "fxcollab")
    return isinstance(function, FunctionType) and function.__module__.partition(".")[0] not in ours


def innermost_helper(error: BaseException, known: Iterable[Helper]) -> Helper | None:
    """The innermost helper function in which ``error`` was raised and that is not yet ``known``."""
    found = None
    caller: TracebackType | None = None
    trace = error.__traceback__
    while trace is not None:
        helper = _called_helper(caller, trace) if caller is not None else None
        found = helper if helper is not None and helper not in known else found
        caller, trace = trace, trace.tb_next
    return found


def _called_helper(caller: TracebackType, callee: TracebackType) -> Helper | None:
    code, scope = callee.tb_frame.f_code, caller.tb_frame.f_globals
    scope_name = scope.get("__name__")
    function: Any = scope.get(code.co_name)
    if not is_helper(function) or function.__code__ is not code:
        return None
    importable = getattr(sys.modules.get(function.__module__), function.__name__, None) is function
    if not importable or not isinstance(scope_name, str) or scope_name not in sys.modules:
        return None
    return Helper(function, scope_name, code.co_name)


@contextmanager
def record_helpers(helpers: Iterable[Helper], record: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Call ``record`` with function, arguments and keyword arguments where a helper is called with proxies."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for helper in helpers:
            scope = vars(sys.modules[helper.scope])
            saved.append((scope, helper.name, scope[helper.name]))
            scope[helper.name] = _recorded(helper.function, record)
        yield
    finally:
        for scope, name, function in reversed(saved):
            scope[name] = function


def _recorded(function: FunctionType, record: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        proxies = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        if not proxies or not all(isinstance(leaf, _ARGUMENTS) for leaf in leaves):
            return function(*args, **kwargs)
        return record(function, args, kwargs)

    return recorded


# What a node can have as arguments; a function that is called with anything else is traced into.
_ARGUMENTS = (
    fx.Proxy, Tensor, nn.Parameter, type(None), bool, int, float, complex, str,
    torch.dtype, torch.device, torch.layout, torch.memory_format, slice,
)  # fmt: skip
