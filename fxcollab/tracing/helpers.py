"""Helper functions that a forward calls and that can't be traced: each becomes one node.

A function such as ``resize_if_needed(x, size)`` asks for values that a proxy hasn't. Kept whole it asks them at
every call, so that the graph stays right for every input.
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
    """A module-level function, and the module from which the forward calls it.

    Attributes:
        function: the function.
        scope: the name of the module that looks it up.
        name: under which name.
    """

    function: FunctionType
    scope: str
    name: str

    @property
    def title(self) -> str:
        """The function's full name."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


def innermost_helper(error: BaseException, known: Iterable[Helper]) -> Helper | None:
    """The innermost helper function in which ``error`` arose, of those that are not ``known``."""
    found = None
    caller: TracebackType | None = None
    trace = error.__traceback__
    while trace is not None:
        helper = _called_from(caller, trace) if caller is not None else None
        found = helper if helper is not None and helper not in known else found
        caller, trace = trace, trace.tb_next
    return found


def _called_from(caller: TracebackType, callee: TracebackType) -> Helper | None:
    code, scope = callee.tb_frame.f_code, caller.tb_frame.f_globals
    function = scope.get(code.co_name)
    if not isinstance(function, FunctionType) or function.__code__ is not code:
        return None
    home = sys.modules.get(function.__module__)
    importable = getattr(home, function.__name__, None) is function
    ours = function.__module__.partition(".")[0] in ("torch", "fxcollab")
    scope_name = scope.get("__name__")
    if ours or not importable or not isinstance(scope_name, str) or scope_name not in sys.modules:
        return None
    return Helper(function, scope_name, code.co_name)


@contextmanager
def kept_whole(helpers: Iterable[Helper], record: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """For a while, calls of ``helpers`` with proxies are recorded as nodes.

    Args:
        helpers: the functions.
        record: makes the node from function, arguments and keyword arguments.
    """
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for helper in helpers:
            scope = vars(sys.modules[helper.scope])
            saved.append((scope, helper.name, scope[helper.name]))
            scope[helper.name] = _recorder(helper.function, record)
        yield
    finally:
        for scope, name, function in reversed(saved):
            scope[name] = function


def _recorder(function: FunctionType, record: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        proxies = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        if not proxies or not all(isinstance(leaf, _HOLDABLE) for leaf in leaves):
            return function(*args, **kwargs)
        return record(function, args, kwargs)

    return recorded


# What the arguments of a node can hold; a function that takes anything else is traced into.
_HOLDABLE = (
    fx.Proxy, Tensor, nn.Parameter, type(None), bool, int, float, complex, str,
    torch.dtype, torch.device, torch.layout, torch.memory_format, slice,
)  # fmt: skip
