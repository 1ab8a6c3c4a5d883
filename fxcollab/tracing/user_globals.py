"""Stand-ins for ``torch`` and builtins in the globals of user code, for what neither dispatches to proxies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import FakeTensor, pytree
from fxcollab.tracing.callers import calling_line, loaded_scopes
from fxcollab.tracing.recorder import Recorder, has_proxies

# These don't take proxies in every form: sizes given one by one, the dtype of a proxy.
_WITHOUT_DISPATCH: dict[str, Any] = {
    name: getattr(torch, name)
    for name in ("empty", "finfo", "full", "iinfo", "ones", "rand", "randint", "randn", "zeros")
}


@contextmanager
def patched_globals(tracer: Recorder, scopes: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Shadow ``torch`` and builtins in ``scopes``, to record or answer what neither dispatches to proxies.

    ``isinstance``, ``type``, ``callable``, ``getattr`` and ``hasattr`` of a proxy are those of its example value;
    ``len`` of a tensor is a node, whose value may differ from call to call.
    """
    builtins = _builtins(tracer)
    stand_ins: dict[str, tuple[Any, Any]] = {
        "torch": (torch, _TorchFacade(tracer, builtins["isinstance"])),
        **{name: (getattr(torch.overrides, name), partial(_has_overrides, tracer)) for name in _ABOUT_OVERRIDES},
    }
    patched: list[dict[str, Any]] = []
    before = set(sys.modules)
    try:
        for scope in scopes:
            patched.append(scope)
            for name, (original, stand_in) in stand_ins.items():
                if scope.get(name) is original:
                    scope[name] = stand_in
            for name, function in builtins.items():
                scope.setdefault(name, function)
        yield
    finally:
        _restore(patched, stand_ins, builtins)
        _restore(loaded_scopes(besides=before), stand_ins, builtins)  # which may have imported them meanwhile


def _restore(
    scopes: Iterable[dict[str, Any]], stand_ins: Mapping[str, tuple[Any, Any]], builtins: Mapping[str, Any]
) -> None:
    for scope in scopes:
        for name, (original, stand_in) in stand_ins.items():
            if scope.get(name) is stand_in:
                scope[name] = original
        for name, function in builtins.items():
            if scope.get(name) is function:
                del scope[name]


_ABOUT_OVERRIDES = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _has_overrides(tracer: Recorder, *values: Any) -> bool:
    """Whether any of the values for which the proxies stand overrides ``__torch_function__``, as proxies do."""
    types = {type(leaf) for leaf in pytree.tree_leaves(tracer.queries.values_of_types(values))}
    return any(hasattr(cls, "__torch_function__") for cls in types - {Tensor, nn.Parameter, FakeTensor})


def _builtins(tracer: Recorder) -> dict[str, Callable[..., Any]]:
    """Stand-ins for builtins, by their names."""

    def is_traced(value: Any) -> bool:
        return isinstance(value, fx.Proxy) and not tracer.queries.computing

    def is_instance(value: Any, classes: Any) -> bool:
        if not is_traced(value) or _has_proxy_class(classes):
            return isinstance(value, classes)
        return tracer.queries.is_instance(value, classes)

    def has_attribute(value: Any, name: str) -> bool:
        return hasattr(tracer.queries.value_of_type(value) if is_traced(value) else value, name)

    def is_callable(value: Any) -> bool:
        return callable(tracer.queries.value_of_type(value) if is_traced(value) else value)

    def get_attribute(value: Any, name: str, *default: Any) -> Any:
        if default and is_traced(value) and not has_attribute(value, name):
            return default[0]
        return getattr(value, name, *default)

    def length(value: Any) -> Any:
        if is_traced(value) and tracer.queries.is_instance(value, Tensor):
            return tracer.create_proxy("call_function", len, (value,), {})
        return len(value)

    class TypeMeta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is not Type:
                return super().__call__(*args, **kwargs)
            return tracer.queries.type_of(*args) if len(args) == 1 and is_traced(args[0]) else type(*args, **kwargs)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, type) if cls is Type else super().__instancecheck__(value)

    class Type(type, metaclass=TypeMeta):
        """``type``, with the type of its value for a proxy."""

    return {
        "isinstance": is_instance,
        "hasattr": has_attribute,
        "getattr": get_attribute,
        "callable": is_callable,
        "len": length,
        "type": Type,
    }


def _has_proxy_class(classes: Any) -> bool:
    return any(
        isinstance(cls, type) and cls.__module__ == fx.Proxy.__module__
        for cls in (classes if isinstance(classes, tuple) else (classes,))
    )


class _TorchFacade(ModuleType):
    """``torch`` with functions that record calls on proxies; a patch of torch itself could be imported elsewhere."""

    def __init__(self, tracer: Recorder, is_instance: Callable[[Any, Any], bool]) -> None:
        super().__init__("torch", torch.__doc__)
        vars(self).update({name: _recording_call(tracer, original) for name, original in _WITHOUT_DISPATCH.items()})
        self.is_tensor = lambda value: is_instance(value, torch.Tensor)
        self.is_grad_enabled = partial(_is_grad_enabled, tracer)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _recording_call(tracer: Recorder, original: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.queries.computing or not has_proxies(args, kwargs):
            return original(*args, **kwargs)
        return tracer.create_proxy("call_function", original, args, kwargs)

    return call


def _is_grad_enabled(tracer: Recorder) -> bool:
    enabled = torch.is_grad_enabled()
    if enabled and not tracer.queries.computing:
        file, _, line = calling_line()
        tracer.notes[f"{file}:{line} goes the same way whether gradients are enabled or not"] = None
    return enabled
