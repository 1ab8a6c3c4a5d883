"""Arguments of public functions: one of another type than its annotation's is refused, before anything is done."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from fxcollab.errors import ArgumentTypeError

P = ParamSpec("P")
T = TypeVar("T")


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which raises an `ArgumentTypeError` for arguments that don't fit its annotations."""
    signature = inspect.signature(function)
    annotations = functools.cache(lambda: get_type_hints(function))  # their modules may not be loaded yet

    @functools.wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # one is missing, or unknown: Python says so itself
            return function(*args, **kwargs)
        for name, value in given.items():
            if not fits(value, annotations().get(name, Any)):
                raise ArgumentTypeError(
                    f"{name} is of type {_described(value)}.",
                    where=f"fxcollab.{function.__name__}({name}=...)",
                    why=f"its type is {function.__annotations__[name]}",
                    hint=f"help(fxcollab.{function.__name__}) says what each argument is",
                )
        return function(*args, **kwargs)

    return with_checks


def fits(value: object, annotation: Any) -> bool:
    """Whether a value is of an annotation's type, as far as that is seen without running any code of the value's."""
    origin, inner = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:  # which of them is checked where it is used, with the closest ones
        return any(type(value) is type(each) for each in inner)
    if origin is Callable:
        return callable(value)
    if origin is Any or not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return True
    if origin is int:
        return not isinstance(value, bool) and _is_index(value)
    if origin is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if origin is Sequence:
        items = None if isinstance(value, str | bytes) or not isinstance(value, Sequence) else value
        return items is not None and all(fits(item, *inner) for item in items)
    return isinstance(value, origin)


def _is_index(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _described(value: object) -> str:
    """The name of a type, with those of its items."""
    items = sorted({type(item).__name__ for item in value}) if isinstance(value, list | tuple | set) else ()
    return type(value).__name__ + (f" of {', '.join(items)}" if items else "")
