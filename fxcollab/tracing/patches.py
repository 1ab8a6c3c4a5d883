"""Patches of torch, and of the globals of user code, that record what a trace would miss otherwise.

Only one thread traces at a time (see `LazyTracer`); calls of other threads meanwhile behave as usual.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as original_checkpoint

from fxcollab._torch import DATA_DEPENDENT_ERRORS, JIT_ISINSTANCE, FakeTensor, pytree, storage_id
from fxcollab.runtime.operators import INPLACE, CustomFunction, set_data_, writes_in_place
from fxcollab.tracing.callers import called_from_user_code, calling_line, is_library_frame, loaded_scopes
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.queries import ProxyQueries

_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch, name)
    for name in (
        "arange", "bernoulli", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
        "randint", "randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
    )
)  # fmt: skip

# These don't take proxies in every form: sizes given one by one, the dtype of a proxy.
_WITHOUT_DISPATCH: dict[str, Any] = {
    name: getattr(torch, name)
    for name in ("empty", "finfo", "full", "iinfo", "ones", "rand", "randint", "randn", "zeros")
}
_CHECKPOINT_OPTIONS = frozenset(
    ("use_reentrant", "context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state")
)
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_ITEM_WRITES = frozenset(
    (Tensor.__setitem__, *(getattr(Tensor, f"__{name}__") for name in INPLACE if hasattr(Tensor, f"__{name}__")))
)


class Recorder(Protocol):
    """What patches use of a tracer; ``notes`` has sentences about what the graph doesn't preserve."""

    queries: ProxyQueries
    notes: dict[str, None]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation."""

    def call_whole(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a leaf module; of any other run it."""

    def assign_buffer(self, module: nn.Module, name: str, value: Any) -> None:
        """Record an assignment to a buffer."""

    def is_state(self, tensor: Tensor) -> bool:
        """Whether it is a tensor of the model, or stands for one."""

    def proxy_of_state(self, tensor: Any) -> fx.Proxy | None:
        """The proxy of a tensor of the model; None for any other value."""

    def record_of_state(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Record what is computed from tensors of the model."""

    def set_item(self, target: fx.Proxy, key: Any, value: Any) -> None:
        """Record ``target[key] = value``."""


class RecordFactories(TorchFunctionMode):
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
            return func(*args, **kwargs)
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        assigns = func.__name__ == "__set__"
        if _has_proxies(args, kwargs) and not assigns:  # also those that `torch.as_tensor` doesn't look for
            return fx.Proxy.__torch_function__(func, types, args, kwargs)
        writes = assigns or writes_in_place(func.__name__, kwargs) or func in _ITEM_WRITES
        if writes or func == _DATA:
            return self._write(func, args, kwargs)
        if any(
            isinstance(leaf, Tensor) and self._tracer.is_state(leaf) for leaf in pytree.tree_leaves((args, kwargs))
        ):
            return self._read(func, args, kwargs)
        result = func(*args, **kwargs)
        given = {storage_id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
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
            return self._tracer.set_item(proxy, *args[1:])
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


@contextmanager
def patched_torch(tracer: Recorder) -> Iterator[None]:
    """Record custom autograd functions, trace through checkpointing, raise where autocast is entered.

    ``torch.jit.isinstance`` of a proxy is that of its example value. Where gradients are enabled, this is noted.
    """
    apply, is_instance = vars(torch.autograd.Function)["apply"], vars(torch.jit)[JIT_ISINSTANCE]
    patches: list[tuple[Any, str, Any]] = [
        (torch.autograd.Function, "apply", classmethod(_recording_apply(tracer, apply))),
        (FakeTensor, "device", _recording_device(tracer)),
        (torch.jit, JIT_ISINSTANCE, lambda value, types: is_instance(tracer.queries.values_of_types(value), types)),
        (nn.Module, "register_buffer", _recording_register(tracer)),
        *((nn.Module, name, _recording_get(getattr(nn.Module, name))) for name in ("get_parameter", "get_buffer")),
        (torch.autocast, "__enter__", _noticed(tracer, torch.autocast.__enter__, _refuse_autocast)),
        (torch.enable_grad, "__enter__", _noticed(tracer, torch.enable_grad.__enter__, partial(_note_grad, tracer))),
        (
            torch.set_grad_enabled,
            "__init__",
            _noticed(tracer, torch.set_grad_enabled.__init__, partial(_note_grad_mode, tracer)),
        ),
    ]
    saved = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    scopes = [scope for scope in loaded_scopes().all if scope.get("checkpoint") is original_checkpoint]
    for owner, name, patch in patches:
        setattr(owner, name, patch)
    for scope in scopes:
        scope["checkpoint"] = _transparent_checkpoint(tracer)
    try:
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)
        for scope in scopes:
            scope["checkpoint"] = original_checkpoint


def overrides_call(module: nn.Module) -> bool:
    """Whether the module's class has a ``__call__`` of its own."""
    # The class of a single graph module only adds to messages of errors.
    cls = type(module).__bases__[0] if isinstance(module, fx.GraphModule) else type(module)
    return cls.__call__ is not nn.Module.__call__


@contextmanager
def recorded_overrides(tracer: Recorder, root: nn.Module) -> Iterator[None]:
    """Record calls of modules with a ``__call__`` of their own as a whole, where they are leaf modules."""
    classes = {type(module) for module in root.modules() if overrides_call(module)}
    owners = {next(base for base in cls.__mro__ if "__call__" in vars(base)) for cls in classes}
    saved: list[tuple[Any, Any]] = [(owner, vars(owner)["__call__"]) for owner in owners]

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return tracer.call_whole(module, partial(original, module), args, kwargs)

        return call

    for owner, original in saved:
        owner.__call__ = recording(original)
    try:
        yield
    finally:
        for owner, original in saved:
            owner.__call__ = original


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
    loaded = loaded_scopes()
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
        now = loaded_scopes()
        loaded_since = now.all if now is not loaded else ()
        for scope in (*patched, *loaded_since):  # a module loaded meanwhile may have imported the names
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


def _has_proxies(*values: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(values))


def _recording_apply(tracer: Recorder, original: Any) -> Callable[..., Any]:
    """A custom ``autograd.Function`` becomes a node; traced through, it would lose its backward."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_proxies(args, kwargs) or cls.__module__.partition(".")[0] == "torch":
            return original.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", CustomFunction(cls), args, kwargs)

    return apply


def _recording_call(tracer: Recorder, original: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.queries.computing or not _has_proxies(args, kwargs):
            return original(*args, **kwargs)
        return tracer.create_proxy("call_function", original, args, kwargs)

    return call


def _recording_device(tracer: Recorder) -> property:
    """The only attribute of fake tensors that torch's function modes don't see."""
    original = vars(FakeTensor)["device"]

    def device(self: Any) -> Any:
        asked = called_from_user_code() and not tracer.queries.computing and tracer.is_state(self)
        return tracer.record_of_state(lambda tensor: tensor.device, (self,), {}) if asked else original.fget(self)

    return property(device, original.fset)


def _recording_register(tracer: Recorder) -> Callable[..., None]:
    """``register_buffer``, by which modules assign buffers too."""
    original = nn.Module.register_buffer

    def register(module: nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
        original(module, name, tensor, persistent)
        if isinstance(tensor, fx.Proxy):
            tracer.assign_buffer(module, name, tensor)

    return register


def _recording_get(original: Any) -> Callable[..., Any]:
    """A method that finds a proxy by its path, of which the original says that it is no parameter or buffer."""

    def get(module: nn.Module, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        value = getattr(module.get_submodule(owner), name, None)
        return value if isinstance(value, fx.Proxy) else original(module, target)

    return get


def _noticed(tracer: Recorder, original: Callable[..., Any], notice: Callable[..., None]) -> Callable[..., Any]:
    """A method of a context that calls ``notice`` with its arguments first, if the traced forward calls it."""
    thread = threading.get_ident()

    def method(context: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracer.queries.computing and threading.get_ident() == thread:
            notice(*args, **kwargs)
        return original(context, *args, **kwargs)

    return method


def _refuse_autocast() -> None:
    raise UntraceableError("autocast is entered inside the forward, which a graph can't record")


def _note_grad(tracer: Recorder) -> None:
    file, _, line = calling_line()
    sentence = "has no effect when the graph runs under torch.no_grad(): it computes without gradients there too"
    tracer.notes[f"torch.enable_grad() at {file}:{line} {sentence}"] = None


def _note_grad_mode(tracer: Recorder, mode: bool) -> None:
    if mode and not is_library_frame(sys._getframe(2)):  # `no_grad` sets the mode that was before, too
        _note_grad(tracer)


def _is_grad_enabled(tracer: Recorder) -> bool:
    enabled = torch.is_grad_enabled()
    if enabled and not tracer.queries.computing:
        file, _, line = calling_line()
        tracer.notes[f"{file}:{line} goes the same way whether gradients are enabled or not"] = None
    return enabled


def _transparent_checkpoint(tracer: Recorder) -> Callable[..., Any]:
    """Checkpointed code is traced like any other: under ``no_grad``, as it runs, it would lose its gradients."""

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not _has_proxies(args, kwargs):
            return original_checkpoint(function, *args, **kwargs)
        tracer.notes["activation checkpointing in an opened forward is not kept"] = None
        return function(*args, **{key: value for key, value in kwargs.items() if key not in _CHECKPOINT_OPTIONS})

    return checkpoint
