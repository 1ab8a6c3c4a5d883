"""Helper functions, and functions and classes of torch, that can't be traced: calls of them are one node.

A function such as ``resize_if_needed(x, size)`` needs concrete values, which a proxy doesn't have. As a node it gets
them at every call, so that the graph is right for every input.
"""

from __future__ import annotations

import functools
import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType, FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import pytree
from fxcollab.tracing.callers import is_library_frame, loaded_scopes


@dataclass(frozen=True)
class Helper:
    """A module-level function, or a class of torch such as ``Normal``, whose calls become one node."""

    function: FunctionType | type

    @property
    def title(self) -> str:
        """The full name."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


def is_helper(function: Any) -> bool:
    """Whether it is a Python function of the user's or of a third library."""
    return isinstance(function, FunctionType) and _package(function) not in ("torch", "fxcollab")


def innermost_helper(error: BaseException, known: Iterable[Helper]) -> Helper | None:
    """The innermost helper in which ``error`` was raised and that is not yet ``known``."""
    found = None
    caller: TracebackType | None = None
    trace = error.__traceback__
    while trace is not None:
        helper = _called_helper(caller.tb_frame, trace.tb_frame) if caller is not None else None
        found = helper if helper is not None and helper not in known else found
        caller, trace = trace, trace.tb_next
    return found


def running_class(known: Iterable[Helper]) -> Helper | None:
    """The innermost class of torch, not yet ``known``, of which a method runs now: a node needs no answers."""
    for frame, _ in traceback.walk_stack(None):
        helper = _called_helper(frame.f_back, frame) if frame.f_back is not None else None
        if helper is not None and isinstance(helper.function, type) and helper not in known:
            return helper
    return None


def _called_helper(caller: FrameType, callee: FrameType) -> Helper | None:
    """The function of the user's, or of torch called by the user's code, or the class of torch that was called."""
    code = callee.f_code
    function: Any = callee.f_globals.get(code.co_name)
    if not isinstance(function, FunctionType) or function.__code__ is not code:
        function = type(callee.f_locals.get(code.co_varnames[0])) if code.co_argcount else None
        never_nodes = (nn.Module, Tensor, fx.Proxy)
        if function is None or issubclass(function, never_nodes) or hasattr(function, "__enter__"):
            return None
    importable = getattr(sys.modules.get(function.__module__), function.__name__, None) is function
    of_torch = _package(function) == "torch" and (isinstance(function, type) or not is_library_frame(caller))
    return Helper(function) if importable and (of_torch or is_helper(function)) else None


def _package(function: Any) -> str:
    return str(function.__module__).partition(".")[0]


@contextmanager
def record_helpers(helpers: Iterable[Helper], record: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Call ``record`` with function, arguments and keyword arguments where a helper is called with proxies."""
    with ExitStack() as restored:
        for helper in helpers:
            function = helper.function
            recorded: Any = _recorded(function, record)
            if isinstance(function, type):
                recorded = _class_that_calls(recorded, function)
            for scope in loaded_scopes().all:
                for name in [name for name, value in list(scope.items()) if value is function]:
                    scope[name] = recorded
                    restored.callback(operator.setitem, scope, name, function)
        yield


def _class_that_calls(function: Callable[..., Any], original: type) -> type:
    """A class of which ``original``'s objects are instances, and which calls ``function`` instead of making one."""
    stand_in = {"__call__": staticmethod(function), "__instancecheck__": lambda _, value: isinstance(value, original)}
    return type("Recorded", (type(original),), stand_in)(original.__name__, (original,), {})  # type: ignore[no-any-return]


def _recorded(function: Callable[..., Any], record: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function, updated=())
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
