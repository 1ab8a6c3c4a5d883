"""Inputs for a model that nobody gave any for: guessed from its first layer, tried on fake tensors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import DATA_DEPENDENT_ERRORS, FakeTensorMode
from fxcollab.codegen.modes import set_mode
from fxcollab.errors import CaptureError, one_line
from fxcollab.functional import call_with, copied_state, once_each
from fxcollab.rng import preserve_rng_state
from fxcollab.tracing.interface import ExampleInputs, InputSpec, Interface, forward_of, interface_of
from fxcollab.tracing.preserve import preserved, replace_plain_tensors

SMALL_IMAGES = (64, 224, 32, 299, 128, 256, 384, 28)
USUAL_IMAGES = (224, 299, 32, 64, 128, 256, 384, 28)
BATCH = 2


def guess_inputs(
    model: nn.Module, images: Sequence[int] = SMALL_IMAGES, *, known: Interface | None = None
) -> Interface:
    """The first of the usual input shapes that ``model`` accepts in train and in eval mode.

    Args:
        model: a module with one required input; it is not run on real values and stays as it is.
        images: edge lengths to try for images, in this order.
        known: what an earlier capture saw of the inputs; a structure of tensors can't be guessed.

    Raises:
        CaptureError: none fits, or the model needs several inputs.
    """
    interface = interface_of(model)
    names = [spec.name for spec in interface.inputs]
    if structured := (known or interface).structured:
        raise CaptureError(
            f"No input that {type(model).__qualname__} accepts can be guessed.",
            where=forward_of(model),
            why=f"{', '.join(structured)} is a list, a dict or the like",
            hint="give example_inputs",
        )
    if len(names) == 1:
        for spec in _candidates(model, names[0], images):
            guess = replace(interface, inputs=(spec,))
            if accepts(model, guess):
                return guess
    raise CaptureError(
        f"No input that {type(model).__qualname__} accepts could be guessed.",
        why="none of the usual shapes fits" if len(names) == 1 else f"its inputs are {', '.join(names) or 'none'}",
        hint="give an input shape: example_inputs=(torch.randn(1, 3, 224, 224),) or --input 1x3x224x224",
    )


def known_interface(model: nn.Module, example_inputs: ExampleInputs | None) -> Interface:
    """The interface under which ``model`` is captured, with all shapes: of the examples, or guessed.

    Raises:
        CaptureError: no usual input fits, or one is a structure of tensors.
    """
    interface = interface_of(model, example_inputs)
    if structured := interface.structured:
        raise CaptureError(
            f"The costs of {type(model).__qualname__} can't be computed.",
            where=forward_of(model),
            why=f"{', '.join(structured)} is a list, a dict or the like, and only tensors are supported",
            hint="name the splits yourself",
        )
    return interface if interface.known else guess_inputs(model, USUAL_IMAGES, known=interface)


def accepts(model: nn.Module, interface: Interface) -> bool:
    """Whether ``model`` runs on such inputs in both modes, tried on fake tensors."""
    return _why_not_in_both_modes(model, lambda: run_on_fakes(model, interface)) is None


def why_not(model: nn.Module, interface: Interface) -> str | None:
    """Why ``model`` fails on such inputs, in a line; None where it runs, or where fake tensors can't tell."""
    try:
        run_on_fakes(model, interface)
    except DATA_DEPENDENT_ERRORS:
        return None
    except _USER_ERRORS as error:
        return one_line(error)
    return None


def why_not_on(model: nn.Module, interface: Interface, values: Sequence[Any]) -> str | None:
    """Why ``model`` fails on these very inputs, in a line; None where it runs in both modes, or has no data."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return None

    def call() -> None:
        replace_plain_tensors(model.modules(), Tensor.clone)
        args, kwargs = interface.call(model, copy.deepcopy(list(values)))
        call_with(model, copied_state(model, Tensor.clone), args, kwargs)

    with preserve_rng_state():
        return _why_not_in_both_modes(model, call)


_USER_ERRORS = (Exception, SystemExit)
"""What user code may raise on a wrong shape: whatever it likes."""


def _why_not_in_both_modes(model: nn.Module, call: Callable[[], object]) -> str | None:
    with preserved(model.modules()), torch.no_grad():
        for training in (True, False):
            set_mode(model, training)
            try:
                call()
            except _USER_ERRORS as error:
                return one_line(error)
    return None


def example_tensors(model: nn.Module, interface: Interface, seed: int = 0) -> list[Tensor]:
    """Random tensors for all inputs, on the model's device; a function of ``seed`` alone.

    Raises:
        CaptureError: the shapes of the inputs aren't known.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return [spec.make(generator).to(device) for spec in interface.inputs]


def run_on_fakes(
    model: nn.Module,
    interface: Interface,
    observer: AbstractContextManager[object] | None = None,
    run: Callable[..., object] | None = None,
) -> object:
    """What ``model`` returns for fake inputs and fake copies of its own state, which stays untouched.

    Args:
        model: a module on any device, or a graph made from one.
        interface: its inputs, of known shapes.
        observer: a dispatch mode that shall see the operations.
        run: what to do with the model, called on it and the inputs while parameters take gradients as usual; a call
            of the model unless said.
    """
    examples = example_tensors(model, interface)
    modules = list(model.modules())
    with (
        preserve_rng_state(),
        preserved(modules),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        without_tracebacks(),
        observer or nullcontext(),
    ):

        @once_each
        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor).detach().requires_grad_(run is not None and tensor.requires_grad)

        call = _Call(model, run or (lambda model, *values: _called(model, interface, values)))
        state = copied_state(call, fake)
        replace_plain_tensors(modules, fake)
        return call_with(call, state, tuple(map(fake, examples)))


class _Call(nn.Module):
    """What is done with a model, as a module over its state."""

    def __init__(self, model: nn.Module, run: Callable[..., object]) -> None:
        super().__init__()
        self.model, self._run = model, run

    def forward(self, *inputs: Tensor) -> object:
        return self._run(self.model, *inputs)


def _called(model: nn.Module, interface: Interface, values: Sequence[Tensor]) -> object:
    args, kwargs = interface.call(model, values)
    return model(*args, **kwargs)


@contextmanager
def without_tracebacks() -> Iterator[None]:
    """Keep fake tensors from logging pages about an input that doesn't fit: the error says it."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _candidates(model: nn.Module, name: str, images: Sequence[int]) -> Iterator[InputSpec]:
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "torch.float32")
    dtype = dtype.removeprefix("torch.")
    for shape in _shapes(model, images):
        yield InputSpec(name, shape, dtype)
    yield InputSpec(name, _TOKENS, "int64")


_TOKENS = (BATCH, 16)


def _declared(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """What timm's models say of their input, and those of transformers that take images."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if isinstance(size, list | tuple) and all(isinstance(edge, int) for edge in size):
        yield (BATCH, *size)
    config = getattr(model, "config", None)
    edge, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if isinstance(edge, int) and isinstance(channels, int):
        yield (BATCH, channels, edge, edge)


def _shapes(model: nn.Module, images: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The shape that the model declares, and those that the first layer with parameters may take."""
    yield from _declared(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            yield from ((BATCH, module.in_channels, size, size) for size in images)
            return
        if isinstance(module, nn.Conv1d):
            yield from ((BATCH, module.in_channels, size) for size in (128, 1024, 16000))
            return
        if isinstance(module, nn.Conv3d):
            yield from ((BATCH, module.in_channels, 8, size, size) for size in (64, 112, 224))
            return
        if isinstance(module, nn.Linear):
            yield from ((BATCH, module.in_features), (BATCH, 16, module.in_features))
            return
        if isinstance(module, nn.RNNBase):
            yield (BATCH, 16, module.input_size)
            return
        if isinstance(module, nn.Embedding):
            return
