"""Inputs for a model that nobody gave any for: guessed from its first layer, tried on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from fxcollab.capture.interface import InputSpec, interface_of
from fxcollab.capture.preserve import preserved, set_mode
from fxcollab.errors import CaptureError

SMALL_IMAGES = (64, 224, 32, 299, 128, 256, 384, 28)
USUAL_IMAGES = (224, 299, 32, 64, 128, 256, 384, 28)
BATCH = 2


def guess_inputs(model: nn.Module, images: Sequence[int] = SMALL_IMAGES) -> tuple[InputSpec, ...]:
    """The first of the usual input shapes that ``model`` accepts in train and in eval mode.

    Args:
        model: a module with one required input; it is not run on real values and stays as it is.
        images: edge lengths to try for images, in this order.

    Raises:
        CaptureError: none fits, or the model needs several inputs.
    """
    names = _input_names(model)
    if len(names) == 1:
        for spec in _candidates(model, names[0], images):
            if accepts(model, (spec,)):
                return (spec,)
    raise CaptureError(
        f"No input that {type(model).__qualname__} accepts could be guessed.",
        why="none of the usual shapes fits" if len(names) == 1 else f"its inputs are {', '.join(names) or 'none'}",
        hint="give an input shape: example_inputs=(torch.randn(1, 3, 224, 224),) or --input 1x3x224x224",
    )


def accepts(model: nn.Module, inputs: Sequence[InputSpec]) -> bool:
    """Whether ``model`` runs on such inputs in both modes, tried on fake tensors."""
    examples = example_tensors(inputs)
    modules = list(model.modules())
    with preserved(modules), torch.no_grad():
        for training in (False, True):
            set_mode(modules, training)
            try:
                run_on_fakes(model, examples)
            except Exception:  # whatever the user's code raises on a wrong shape
                return False
    return True


def example_tensors(inputs: Sequence[InputSpec], seed: int = 0) -> list[Tensor]:
    """Random tensors for all inputs, a function of ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    return [spec.make(generator) for spec in inputs]


def run_on_fakes(
    model: nn.Module, examples: Sequence[Tensor], observer: AbstractContextManager[object] | None = None
) -> object:
    """What ``model`` returns for fake copies of ``examples`` and of its own state, which stays untouched.

    Args:
        model: a module on any device.
        examples: positional inputs; they are put on the model's device.
        observer: a dispatch mode that shall see the operations.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _without_tracebacks(), observer or nullcontext():
        fakes: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in fakes:
                fakes[id(tensor)] = mode.from_tensor(tensor.detach())
            return fakes[id(tensor)]

        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        state = {name: fake(tensor) for name, tensor in named}
        return functional_call(model, state, tuple(fake(example.to(device)) for example in examples))


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep fake tensors from logging pages about an input that doesn't fit: the error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _input_names(model: nn.Module) -> tuple[str, ...]:
    if isinstance(model, fx.GraphModule):
        return tuple(str(n.target) for n in model.graph.find_nodes(op="placeholder") if not n.args)
    return interface_of(model).inputs


def _candidates(model: nn.Module, name: str, images: Sequence[int]) -> Iterator[InputSpec]:
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "torch.float32")
    dtype = dtype.removeprefix("torch.")
    for shape in _shapes(model, images):
        yield InputSpec(name, shape, dtype)
    yield InputSpec(name, _TOKENS, "int64")


_TOKENS = (BATCH, 16)


def _shapes(model: nn.Module, images: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Shapes that the first layer with parameters may take."""
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
