"""Example inputs: guessed from a model's first layer, and tried on fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import DATA_DEPENDENT_ERRORS, pytree
from fxcollab.errors import CaptureError, one_line
from fxcollab.flops import counting
from fxcollab.functional import has_values
from fxcollab.limits import check_memory
from fxcollab.tracing.interface import ExampleInputs, InputSpec, Interface, forward_of, interface_of
from fxcollab.tracing.leaks import purge_leaks
from fxcollab.tracing.twin import twin_of

SMALL_IMAGES = (64, 224, 32, 299, 128, 256, 384, 28)
USUAL_IMAGES = (224, 299, 32, 64, 128, 256, 384, 28)
BATCH = 2


def guess_inputs(
    model: nn.Module, images: Sequence[int] = SMALL_IMAGES, *, known: Interface | None = None
) -> Interface:
    """The first of the usual input shapes that ``model`` accepts in train and in eval mode.

    Image sizes are tried in the order of ``images``. Structured inputs can't be guessed; ``known`` is an interface of
    an earlier capture, which may have seen some, and is returned where it knows all shapes.
    """
    if known is not None and known.known:
        return known
    interface = interface_of(model)
    names = [spec.name for spec in interface.inputs]
    if structured := (known or interface).structured:
        raise CaptureError(
            f"No input that {type(model).__qualname__} accepts can be guessed.",
            where=forward_of(model),
            why=f"{', '.join(structured)} is a list, a dict or the like",
            hint="give example_inputs",
        )
    found = next((guess for guess in guesses(model, interface, images) if accepts(model, guess)), None)
    if found is not None:
        return found
    raise CaptureError(
        f"No input that {type(model).__qualname__} accepts could be guessed.",
        why="none of the usual shapes fits" if len(names) == 1 else f"its inputs are {', '.join(names) or 'none'}",
        hint=f"give {'one for each' if len(names) > 1 else 'one'}: example_inputs=(torch.ones(1, 3, 224, 224), ...), "
        "or on the command line sizes with, unless float32, a type: --input 1x3x224x224, --input 2x16:bool",
    )


def guesses(model: nn.Module, interface: Interface, images: Sequence[int] = SMALL_IMAGES) -> Iterator[Interface]:
    """Usual input shapes, those that the model's first layer suggests; the same for all of its inputs."""
    if interface.inputs and not interface.structured:
        if isinstance(model, fx.GraphModule) and (traced := _traced_inputs(model, interface)):
            yield replace(interface, inputs=traced)
        for found in _candidates(model, interface.inputs[0].name, images):
            yield replace(interface, inputs=tuple(replace(found, name=spec.name) for spec in interface.inputs))


def known_interface(model: nn.Module, example_inputs: ExampleInputs | None) -> Interface:
    """The interface under which ``model`` is captured, with the shapes of the examples, or guessed ones."""
    interface = interface_of(model, example_inputs)
    if structured := interface.structured:
        raise CaptureError(
            f"The costs of {type(model).__qualname__} can't be computed.",
            where=forward_of(model),
            why=f"{', '.join(structured)} is a list, a dict or the like, and only tensors are supported",
            hint="name the splits yourself",
        )
    return guess_inputs(model, USUAL_IMAGES, known=interface)


@torch.no_grad()
def accepts(model: nn.Module, interface: Interface) -> bool:
    """Whether ``model`` runs on such inputs in both modes, tried on fake tensors."""
    return _error(model, interface, (True, False)) is None


def why_not(model: nn.Module, interface: Interface, *, training: bool | None = None) -> str | None:
    """The error, in a line, that ``model`` raises on such inputs; None if there is none, or if it depends on data.

    ``training`` is the mode, by default the model's own.
    """
    return _error(model, interface, (training,), ignored=DATA_DEPENDENT_ERRORS)


@torch.no_grad()
def failures_on(model: nn.Module, interface: Interface, values: Sequence[Any]) -> list[CaptureError | None]:
    """The errors with which ``model`` fails on these values in train and in eval mode; one on meta on fake ones."""
    given, ignored = (values, ()) if has_values(model) else (None, DATA_DEPENDENT_ERRORS)
    reasons = [_error(model, interface, (mode,), given, ignored) for mode in (True, False)]
    return [None if reason is None else _failure(model, reason) for reason in reasons]


def _failure(model: nn.Module, reason: str) -> CaptureError:
    return CaptureError(
        "The model fails on the example inputs.",
        where=forward_of(model),
        why=reason,
        hint="give example_inputs (--input 1x3x224x224, --input 2x16:int64) that it takes in train and in eval mode",
    )


@purge_leaks()
def _error(
    model: nn.Module,
    interface: Interface,
    modes: Iterable[bool | None],
    values: Sequence[Any] | None = None,
    ignored: tuple[type[Exception], ...] = (),
) -> str | None:
    for training in modes:
        try:
            run_on_twin(model, interface, training=training, values=values)
        except ignored:
            return None
        except (Exception, SystemExit) as error:  # user code may raise anything on a wrong shape
            return one_line(error)
    return None


def example_tensors(model: nn.Module, interface: Interface, seed: int = 0) -> list[Tensor]:
    """Random tensors for all inputs, whose shapes must be known, on the model's device."""
    check_memory(sum(spec.size_in_bytes() for spec in interface.inputs), "the example inputs", "give smaller ones")
    generator = torch.Generator().manual_seed(seed)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return [spec.make(generator).to(device) for spec in interface.inputs]


def run_on_twin(
    model: nn.Module,
    interface: Interface,
    run: Callable[..., object] | None = None,
    *,
    training: bool | None = None,
    values: Sequence[Any] | None = None,
) -> object:
    """What a twin of ``model`` returns for fake inputs; with ``values``, one with real tensors for copies of these.

    ``run`` is called on the twin and the inputs, instead of the twin.
    ``training`` is the mode, by default the model's own.
    """
    twin = twin_of(model, training, real=values is not None)
    given = example_tensors(model, interface) if values is None else copy.deepcopy(list(values))
    inputs = tuple(pytree.tree_map_only(Tensor, twin.stand_in, given))
    try:
        with twin.running():
            if run is not None:
                return run(twin.model, *inputs)
            args, kwargs = interface.call(twin.model, inputs)
            return twin.model(*args, **kwargs)
    finally:
        twin.forget()


@purge_leaks()
def forward_flops(model: nn.Module, interface: Interface, values: Sequence[Any] | None = None) -> Mapping[str, int]:
    """The FLOPs of each of a model's modules in a forward, by path; that of the root is empty."""
    counter = counting()

    def run(twin: nn.Module, *inputs: Tensor) -> None:
        args, kwargs = interface.call(twin, inputs)
        with counter:
            twin(*args, **kwargs)

    with torch.inference_mode(False):  # which would hide what operations are made of
        run_on_twin(model, interface, run, values=values)
    counts = {name.partition(".")[2]: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    return counts | {"": counter.get_total_flops()}


def real_values(model: nn.Module, interface: Interface, example_inputs: ExampleInputs | None) -> Sequence[Any] | None:
    """What a copy of ``model`` can really run on; None where no examples are given, or on meta."""
    return None if example_inputs is None or not has_values(model) else interface.values_of(model, example_inputs)


def _traced_inputs(model: fx.GraphModule, interface: Interface) -> tuple[InputSpec, ...] | None:
    """The inputs on which a graph was traced, as ``torch.export`` notes them; None where it has no such notes."""
    values = {str(node.target): node.meta.get("val") for node in model.graph.find_nodes(op="placeholder")}
    found = {spec.name: values.get(spec.name) for spec in interface.inputs}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if tensors.keys() != found.keys():
        return None
    shapes = {name: tuple(map(_size, value.shape)) for name, value in tensors.items()}
    return tuple(replace(InputSpec.of(name, value), shape=shapes[name]) for name, value in tensors.items())


def _size(size: Any) -> int:
    """A size, or of a symbolic one that of the example, without a guard on it."""
    return size if isinstance(size, int) else int(size.node.hint or BATCH)


def _candidates(model: nn.Module, name: str, images: Sequence[int]) -> Iterator[InputSpec]:
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "torch.float32")
    for shape in (*_declared_shapes(model), *_first_layer_shapes(model, images)):
        yield InputSpec(name, shape, dtype.removeprefix("torch."))
    for last in [parameter.shape[-1] for parameter in model.parameters() if parameter.dim()][:1]:
        yield InputSpec(name, (BATCH, last), dtype.removeprefix("torch."))
        yield InputSpec(name, (BATCH, 16, last), dtype.removeprefix("torch."))
    yield InputSpec(name, (BATCH, 16), "int64")  # tokens
    yield InputSpec(name, (BATCH, 16), dtype.removeprefix("torch."))  # features


def _declared_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """The input shapes that models of timm, and those of transformers that take images, declare."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if isinstance(size, list | tuple) and all(isinstance(edge, int) for edge in size):
        yield (BATCH, *size)
    config = getattr(model, "config", None)
    edge, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if isinstance(edge, int) and isinstance(channels, int):
        yield (BATCH, channels, edge, edge)


def _first_layer_shapes(model: nn.Module, images: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The shapes that the first layer with parameters may take."""
    for module in model.modules():
        match module:
            case nn.Conv2d():
                yield from ((BATCH, module.in_channels, size, size) for size in images)
            case nn.Conv1d():
                yield from ((BATCH, module.in_channels, size) for size in (128, 1024, 16000))
            case nn.Conv3d():
                yield from ((BATCH, module.in_channels, 8, size, size) for size in (64, 112, 224))
            case nn.Linear():
                yield from ((BATCH, module.in_features), (BATCH, 16, module.in_features))
            case nn.RNNBase():
                yield (BATCH, 16, module.input_size)
            case nn.Embedding():
                pass
            case _:
                continue
        return
