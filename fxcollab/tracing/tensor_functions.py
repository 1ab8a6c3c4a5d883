"""Calls of torch on what is no proxy: factories are recorded, and so are reads and writes of the model's state."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fxcollab._torch import DATA_DEPENDENT_ERRORS, pytree, storage_id
from fxcollab.runtime.operators import INPLACE, set_data_, writes_in_place
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.recorder import Recorder, has_proxies

_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch, name)
    for name in (
        "arange", "bernoulli", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
        "randint", "randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
    )
)  # fmt: skip

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_ITEM_WRITES = frozenset(
    (Tensor.__setitem__, *(getattr(Tensor, f"__{name}__") for name in INPLACE if hasattr(Tensor, f"__{name}__")))
)


class TensorFunctions(TorchFunctionMode):
    """Record calls such as ``torch.rand(3)``, and writes into the model's state.

    Parameters that a forward finds by ``self.parameters()``, and plain tensor attributes, are not proxies: writing to
    them would change the model that is captured.
    """

    def __init__(self, tracer: Recorder) -> None:
        super().__init__()
        self._tracer = tracer
        self._created: dict[int, Tensor] = {}  # by storage; the tensor keeps its storage alive, and so the id valid

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._tracer.queries.computing:
            value = func(*args, **kwargs)
            self._tracer.names.note_example(value)
            return value
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        assigns = func.__name__ == "__set__"
        if has_proxies(args, kwargs) and not assigns:  # also those that `torch.as_tensor` doesn't look for
            return fx.Proxy.__torch_function__(func, types, args, kwargs)
        writes = assigns or writes_in_place(func.__name__, kwargs) or func in _ITEM_WRITES
        if writes or func == _DATA:
            return self._write(func, args, kwargs)
        names = self._tracer.names
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(map(names.is_state, tensors)):
            return self._read(func, args, kwargs)
        result = func(*args, **kwargs)
        if names.is_of_example(tensors):  # which a module or a hook has left where the forward finds it
            names.note_example(result)
        given = set(map(storage_id, tensors))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and storage_id(leaf) not in given:
                self._created[storage_id(leaf)] = leaf
        return result

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record what is computed from state that isn't a proxy, but shapes: they never change."""
        with self._tracer.queries.not_recording(), suppress(RuntimeError, *DATA_DEPENDENT_ERRORS):
            value = func(*args, **kwargs)
            is_question = isinstance(value, bool) and func.__name__ == "__get__"  # such as requires_grad
            if isinstance(value, int | torch.Size) and not is_question:
                return value
        return self._tracer.record_of_state(_on_proxies(func), args, kwargs)

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a write into state, and run one into a tensor that the forward created; any other raises."""
        target = kwargs.get("out", args[0])
        proxy = self._tracer.proxy_of_state(target)
        if proxy is not None and (func.__name__ != "__set__" or func == _SET_DATA):
            return self._record(func, proxy, args, kwargs)
        if func != _DATA and isinstance(target, Tensor) and storage_id(target) not in self._created:
            raise UntraceableError(
                f"{func.__name__} writes into a tensor of shape {tuple(target.shape)} that is not a parameter, a "
                "buffer or an attribute of a module, so that the graph can't refer to it"
            )
        return func(*args, **kwargs)

    def _record(self, func: Any, proxy: fx.Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func == _DATA:
            return proxy.data
        if func == _SET_DATA:
            return self._tracer.create_proxy("call_function", set_data_, (proxy, *args[1:]), {})
        if func is Tensor.__setitem__:
            return self._tracer.create_proxy("call_function", operator.setitem, (proxy, *args[1:]), {})
        if func in _ITEM_WRITES:
            function = INPLACE[func.__name__.strip("_")]
            return self._tracer.create_proxy("call_function", function, (proxy, *args[1:]), {})
        return self._tracer.create_proxy("call_method", func.__name__, (proxy, *args[1:]), kwargs)


def _on_proxies(func: Any) -> Callable[..., Any]:
    """A function that records a call of ``func``, of which some arguments are proxies."""
    name = func.__name__
    if name == "__get__":
        return lambda value: getattr(value, func.__self__.__name__)
    if name.startswith("__"):
        return lambda value, *others: getattr(value, name)(*others)
    if getattr(Tensor, name, None) is func:
        return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
    return lambda *args, **kwargs: fx.Proxy.__torch_function__(func, (), args, kwargs)
