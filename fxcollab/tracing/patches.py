"""Patches of torch that record what a trace would miss otherwise.

Only one thread traces at a time (see `LazyTracer`); calls of other threads meanwhile behave as usual.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint as original_checkpoint

from fxcollab._torch import JIT_ISINSTANCE, FakeTensor
from fxcollab.runtime.operators import CustomFunction
from fxcollab.tracing.callers import called_from_user_code, calling_line, is_library_frame, loaded_scopes, replaced
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.recorder import Recorder, has_proxies

_CHECKPOINT_OPTIONS = frozenset(
    ("use_reentrant", "context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state")
)


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
            torch.autograd.graph.saved_tensors_hooks,
            "__enter__",
            _noticed(tracer, torch.autograd.graph.saved_tensors_hooks.__enter__, partial(_note_checkpoint, tracer)),
        ),
        (
            torch.set_grad_enabled,
            "__init__",
            _noticed(tracer, torch.set_grad_enabled.__init__, partial(_note_grad_mode, tracer)),
        ),
    ]
    scopes = [scope for scope in loaded_scopes() if scope.get("checkpoint") is original_checkpoint]
    checkpoint = _transparent_checkpoint(tracer)
    with replaced([*patches, *((scope, "checkpoint", checkpoint) for scope in scopes)]):
        yield


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

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return tracer.call_whole(module, partial(original, module), args, kwargs)

        return call

    with replaced((owner, "__call__", recording(vars(owner)["__call__"])) for owner in owners):
        yield


def _recording_apply(tracer: Recorder, original: Any) -> Callable[..., Any]:
    """A custom ``autograd.Function`` becomes a node; traced through, it would lose its backward."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_proxies(args, kwargs) or cls.__module__.partition(".")[0] == "torch":
            return original.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", CustomFunction(cls), args, kwargs)

    return apply


def _recording_device(tracer: Recorder) -> property:
    """The only attribute of fake tensors that torch's function modes don't see."""
    original = vars(FakeTensor)["device"]

    def device(self: Any) -> Any:
        asked = called_from_user_code() and not tracer.queries.computing and tracer.names.is_state(self)
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


def _note_checkpoint(tracer: Recorder) -> None:
    sentence = (
        "gradient checkpointing in an opened forward is not kept: switch it on in the training model, by the same"
    )
    tracer.notes[f"{sentence} method (set_grad_checkpointing, gradient_checkpointing_enable)"] = None


def _transparent_checkpoint(tracer: Recorder) -> Callable[..., Any]:
    """Checkpointed code is traced like any other: under ``no_grad``, as it runs, it would lose its gradients."""

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not has_proxies(args, kwargs):
            return original_checkpoint(function, *args, **kwargs)
        _note_checkpoint(tracer)
        return function(*args, **{key: value for key, value in kwargs.items() if key not in _CHECKPOINT_OPTIONS})

    return checkpoint
