"""Helper functions, and functions and classes of torch, that can't be traced: calls of them are one node.

A function such as ``resize_if_needed(x, size)`` needs concrete values, which a proxy doesn't have. As a node it gets
them at every call, so that the graph is right for every input.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from inspect import CO_VARARGS, CO_VARKEYWORDS
from itertools import takewhile
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import pytree
from fxcollab.tracing.callers import is_library_frame, loaded_scopes, replaced
from fxcollab.tracing.errors import ArgumentError
from fxcollab.tracing.example_values import ExampleValues

Helper: TypeAlias = Callable[..., Any]
"""A module-level function, or a class such as ``Normal``, whose calls become one node.

Functions may be those of ``functools.lru_cache``.
"""

_Cached = functools._lru_cache_wrapper


def is_helper(function: Any) -> bool:
    """Whether it is a Python function of the user's or of a third library."""
    return isinstance(function, FunctionType | _Cached) and _package(function) not in ("torch", "fxcollab")


def innermost_helper(error: BaseException, known: Iterable[Helper]) -> Helper | None:
    """The innermost helper in which ``error`` was raised and that is not yet ``known``.

    For an `ArgumentError` it is the class of the object.
    """
    if isinstance(error, ArgumentError) and _is_python_class(error.kind) and error.kind not in known:
        return error.kind
    found = None
    caller: TracebackType | None = None
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not ExampleValues.value.__code__:  # no node fails there
        helper = _called_helper(caller.tb_frame, trace.tb_frame) if caller is not None else None
        found = helper if helper is not None and helper not in known else found
        caller, trace = trace, trace.tb_next
    return found


def asking_helper(known: Collection[Helper], outermost: CodeType) -> Helper | None:
    """The innermost helper, not yet ``known``, that runs now and could be one node, which needs no answers.

    Only calls inside of that of ``outermost`` are looked at.
    """
    for frame, _ in takewhile(lambda step: step[0].f_code is not outermost, traceback.walk_stack(None)):
        helper = _called_helper(frame.f_back, frame) if frame.f_back is not None else None
        if helper is None or helper in known:
            continue
        if isinstance(helper, type) or _has_recordable_arguments(frame):
            return helper
    return None


def cached_helper(known: Collection[Helper]) -> Helper | None:
    """A function under ``lru_cache``, not yet ``known``, to which the user code refers that runs now."""
    frame = next((frame for frame, _ in traceback.walk_stack(None) if not is_library_frame(frame)), None)
    named = (frame.f_globals.get(name) for name in frame.f_code.co_names) if frame is not None else ()
    found = (value for value in named if isinstance(value, _Cached) and _is_importable(value))
    return next((helper for helper in found if helper not in known), None)


def _has_recordable_arguments(frame: FrameType) -> bool:
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & CO_VARARGS)
    given = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
    if code.co_flags & CO_VARKEYWORDS:
        given += frame.f_locals.get(code.co_varnames[count], {}).values()
    return _are_recordable(tuple(given))


def _are_recordable(given: tuple[Any, ...]) -> bool:
    """Whether these can be arguments of a node; not lists and dicts, which the function might change."""
    return all(isinstance(leaf, _ARGUMENTS) for leaf in pytree.tree_leaves(given, is_leaf=_can_be_changed))


def _can_be_changed(value: Any) -> bool:
    return isinstance(value, list | dict)


def _called_helper(caller: FrameType, callee: FrameType) -> Helper | None:
    """The function of the user's, or of torch called by the user's code, or the class of torch that was called."""
    code = callee.f_code
    function: Any = callee.f_globals.get(code.co_name)
    if not isinstance(function, FunctionType) or function.__code__ is not code:
        function = type(callee.f_locals.get(code.co_varnames[0])) if code.co_argcount else None
        never_nodes = (nn.Module, Tensor, fx.Proxy)
        if function is None or issubclass(function, never_nodes) or hasattr(function, "__enter__"):
            return None
    of_torch = _package(function) == "torch" and (isinstance(function, type) or not is_library_frame(caller))
    return function if _is_importable(function) and (of_torch or is_helper(function)) else None


def _is_importable(function: Any) -> bool:
    return getattr(sys.modules.get(function.__module__), function.__name__, None) is function


def _is_python_class(kind: type) -> bool:
    """Whether it can be imported and was made by a class statement, not in C."""
    return bool(kind.__flags__ & _HEAP_TYPE) and type(kind).__module__ != "pybind11_builtins" and _is_importable(kind)


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _package(function: Any) -> str:
    return str(function.__module__).partition(".")[0]


@contextmanager
def record_helpers(helpers: Iterable[Helper], record: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Call ``record`` with function, arguments and keyword arguments where a helper is called with proxies."""
    places = list[tuple[Any, str, Any]]()
    for function in helpers:
        recorded: Any = _recorded(function, record)
        if isinstance(function, type):
            recorded = _class_that_calls(recorded, function)
        for scope in loaded_scopes():
            places += ((scope, name, recorded) for name, value in list(scope.items()) if value is function)
    with replaced(places):
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
        if isinstance(function, type):  # its objects can be changed, and are made at every call
            return record(function, args, kwargs)
        if not proxies or not _are_recordable((*args, *kwargs.values())):
            return function(*args, **kwargs)
        return record(function, args, kwargs)

    return recorded


# What a node can have as arguments; a function that is called with anything else is traced into.
_ARGUMENTS = (
    fx.Proxy, Tensor, nn.Parameter, type(None), bool, int, float, complex, str,
    torch.dtype, torch.device, torch.layout, torch.memory_format, slice,
)  # fmt: skip
