"""What is patched while a trace lasts, in torch and in the globals of models' code, so that nothing is lost.

Tracers of several threads wait for one another (see `LazyTracer`); what other threads do meanwhile is let through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as original_checkpoint

from fxcollab._torch import pytree, storage_id
from fxcollab.runtime.operators import INPLACE, CustomFunction, writes_in_place
from fxcollab.tracing.answers import Answers
from fxcollab.tracing.callers import loaded_scopes
from fxcollab.tracing.errors import UntraceableError

_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch, name)
    for name in (
        "arange", "bernoulli", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
        "randint", "randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
    )
)  # fmt: skip


_CHECKPOINT_OPTIONS = frozenset(
    ("use_reentrant", "context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state")
)

# What takes no proxy, or not in every form: sizes that are proxies given one by one, the type of a proxy.
_UNDISPATCHED: dict[str, Any] = {
    name: getattr(torch, name)
    for name in ("empty", "finfo", "full", "iinfo", "ones", "rand", "randint", "randn", "zeros")
}


class Recorder(Protocol):
    """What patches ask of a tracer.

    Attributes:
        answers: answers questions about proxies.
        notes: gets a sentence for what the graph doesn't keep.
    """

    answers: Answers
    notes: dict[str, None]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation."""

    def proxy_of_state(self, tensor: Any) -> fx.Proxy | None:
        """The proxy of a tensor of the model; None for any other value."""

    def set_item(self, target: fx.Proxy, key: Any, value: Any) -> None:
        """Record ``target[key] = value``."""


class RecordFactories(TorchFunctionMode):
    """While tracing, a call such as ``torch.rand(3)`` becomes a node, and so does a write into the model's state.

    Parameters that a forward finds by ``self.parameters()``, and plain tensor attributes, are no proxies: writing to
    them would change the model that is captured.
    """

    def __init__(self, tracer: Recorder) -> None:
        super().__init__()
        self._tracer = tracer
        self._made: dict[int, Any] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._tracer.answers.evaluating:
            return func(*args, **kwargs)
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        if _has_proxies(args, kwargs):
            return func(*args, **kwargs)
        writes = func.__name__ == "__set__" or writes_in_place(func.__name__, kwargs) or func in _ITEM_WRITES
        if writes or func is _DATA:
            return self._written(func, args, kwargs)
        result = func(*args, **kwargs)
        self._note_made(result, args, kwargs)
        return result

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A write into a tensor of the forward's own is made, one into state is recorded, any other is refused."""
        target = kwargs.get("out", args[0])
        proxy = self._tracer.proxy_of_state(target)
        if proxy is not None and func.__name__ != "__set__":
            return self._recorded(func, proxy, args, kwargs)
        if func is not _DATA and isinstance(target, Tensor) and _storage(target) not in self._made:
            raise UntraceableError(
                f"{func.__name__} writes into a tensor of shape {tuple(target.shape)} that no graph can name: it is "
                "no parameter, buffer or attribute of a module"
            )
        return func(*args, **kwargs)

    def _recorded(self, func: Any, proxy: fx.Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.__name__.strip("_")
        if func is _DATA:
            return proxy.data
        if func is Tensor.__setitem__:
            return self._tracer.set_item(proxy, *args[1:])
        if func in _ITEM_WRITES:
            return self._tracer.create_proxy("call_function", INPLACE[name], (proxy, *args[1:]), {})
        return self._tracer.create_proxy("call_method", func.__name__, (proxy, *args[1:]), kwargs)

    def _note_made(self, result: Any, *arguments: Any) -> None:
        given = {_storage(leaf) for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self._made[_storage(leaf)] = leaf  # kept, for its storage's address must not be given away


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_ITEM_WRITES = frozenset(
    (Tensor.__setitem__, *(getattr(Tensor, f"__{name}__") for name in INPLACE if hasattr(Tensor, f"__{name}__")))
)


def _storage(tensor: Tensor) -> int:
    return storage_id(tensor) if tensor.layout == torch.strided else id(tensor)


@contextmanager
def patched(tracer: Recorder) -> Iterator[None]:
    """Record custom functions, see through checkpointing, refuse a switch of autocast."""
    function: Any = torch.autograd.Function
    autocast: Any = torch.autocast
    apply, enter = function.__dict__["apply"], autocast.__enter__
    scopes = [scope for scope in loaded_scopes().all if scope.get("checkpoint") is original_checkpoint]
    function.apply = classmethod(_recording(tracer, apply))
    autocast.__enter__ = _refusing(tracer, enter)
    for scope in scopes:
        scope["checkpoint"] = _seeing_through(tracer)
    try:
        yield
    finally:
        function.apply, autocast.__enter__ = apply, enter
        for scope in scopes:
            scope["checkpoint"] = original_checkpoint


@contextmanager
def rewired(tracer: Recorder, scopes: Iterable[dict[str, Any]]) -> Iterator[None]:
    """In the code of ``scopes`` alone, record and answer what neither torch nor Python hands to a proxy.

    ``isinstance``, ``type``, ``callable`` and ``hasattr`` of a proxy tell of the value it stands for; `_UNDISPATCHED`
    functions become nodes.
    """
    facade, answers = _Facade(tracer), _answers(tracer)
    given: list[dict[str, Any]] = []
    loaded = loaded_scopes()
    try:
        for scope in scopes:
            given.append(scope)
            if scope.get("torch") is torch:
                scope["torch"] = facade
            for name, answer in answers.items():
                scope.setdefault(name, answer)
        yield
    finally:
        now = loaded_scopes()
        loaded_since = now.all if now is not loaded else ()
        for scope in (*given, *loaded_since):  # a module that was loaded meanwhile may have taken names over
            if scope.get("torch") is facade:
                scope["torch"] = torch
            for name, answer in answers.items():
                if scope.get(name) is answer:
                    del scope[name]


def _answers(tracer: Recorder) -> dict[str, Callable[..., Any]]:
    """By the names of the builtins that they stand in for."""

    def answered(value: Any) -> bool:
        return isinstance(value, fx.Proxy) and not tracer.answers.evaluating

    def is_instance(value: Any, kinds: Any) -> bool:
        if not answered(value) or _asks_for_proxies(kinds):
            return isinstance(value, kinds)
        return tracer.answers.type_is(value, kinds)

    def has_attribute(value: Any, name: str) -> bool:
        return tracer.answers.has_attribute(value, name) if answered(value) else hasattr(value, name)

    def is_callable(value: Any) -> bool:
        return tracer.answers.is_callable(value) if answered(value) else callable(value)

    def attribute(value: Any, name: str, *default: Any) -> Any:
        if default and answered(value) and not tracer.answers.has_attribute(value, name):
            return default[0]
        return getattr(value, name, *default)

    class Asked(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            asks = cls is Type and len(args) == 1
            if asks:
                return tracer.answers.type_of(args[0]) if answered(args[0]) else type(args[0])
            return super().__call__(*args, **kwargs) if cls is not Type else type(*args, **kwargs)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, type) if cls is Type else super().__instancecheck__(value)

    class Type(type, metaclass=Asked):
        """``type`` itself, but for proxies."""

    return {
        "isinstance": is_instance,
        "hasattr": has_attribute,
        "getattr": attribute,
        "callable": is_callable,
        "type": Type,
    }


def _asks_for_proxies(kinds: Any) -> bool:
    return any(
        isinstance(kind, type) and kind.__module__ == fx.Proxy.__module__
        for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
    )


class _Facade(ModuleType):
    """Torch, with functions that record calls on proxies; patching torch itself would outlast the trace in others."""

    def __init__(self, tracer: Recorder) -> None:
        super().__init__("torch", torch.__doc__)
        vars(self).update({name: _recording_call(tracer, original) for name, original in _UNDISPATCHED.items()})
        is_instance = _answers(tracer)["isinstance"]
        self.is_tensor = lambda value: is_instance(value, torch.Tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _has_proxies(*values: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(values))


def _recording(tracer: Recorder, original: Any) -> Callable[..., Any]:
    """A custom ``autograd.Function`` becomes a node; traced through, it would lose its backward."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_proxies(args, kwargs) or cls.__module__.partition(".")[0] == "torch":
            return original.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", CustomFunction(cls), args, kwargs)

    return apply


def _recording_call(tracer: Recorder, original: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.answers.evaluating or not _has_proxies(args, kwargs):
            return original(*args, **kwargs)
        return tracer.create_proxy("call_function", original, args, kwargs)

    return call


def _refusing(tracer: Recorder, enter: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast leaves no node behind."""
    thread = threading.get_ident()

    def refuse(context: Any) -> Any:
        if tracer.answers.evaluating or threading.get_ident() != thread:
            return enter(context)
        raise UntraceableError("autocast is switched inside the forward, and a graph would forget that")

    return refuse


def _seeing_through(tracer: Recorder) -> Callable[..., Any]:
    """Checkpointed code is traced like any other: under ``no_grad``, as it runs, it would lose its gradients."""

    def direct(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not _has_proxies(args, kwargs):
            return original_checkpoint(function, *args, **kwargs)
        tracer.notes["activation checkpointing in an opened forward is not kept"] = None
        return function(*args, **{key: value for key, value in kwargs.items() if key not in _CHECKPOINT_OPTIONS})

    return direct
