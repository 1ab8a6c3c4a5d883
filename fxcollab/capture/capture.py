"""Capture: a model becomes a graph, opened only as far as the splits need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import fx, nn

from fxcollab.capture.interface import ExampleInputs, interface_of
from fxcollab.capture.preflight import given_up
from fxcollab.capture.preserve import preserved, set_mode
from fxcollab.capture.proxy import readable
from fxcollab.capture.tracer import LazyTracer, belongs_to_the_machinery
from fxcollab.codegen import CollabGraphModule, Modes
from fxcollab.errors import CaptureError
from fxcollab.graphs import copy_graph

Granularity = Literal["auto", "op"]
NOTES_KEY = "fxcollab_given_up"


def capture(
    model: nn.Module,
    splits: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
    granularity: Granularity = "auto",
    *,
    inputs: Sequence[str] = (),
) -> CollabGraphModule:
    """The model as a graph over its own modules.

    Only the modules that contain a split are opened; every other module stays one node, the same object with
    its hooks, parametrizations and train/eval behaviour. Both modes are traced: where a forward reads
    ``self.training``, the captured module follows ``.train()`` and ``.eval()``.

    Args:
        model: any module, on any device; a ``GraphModule`` is taken as it is and never traced again.
        splits: split names whose enclosing modules are opened.
        example_inputs: tuple or dict; tells which optional parameters of the forward become inputs.
        granularity: ``"auto"`` opens only what the splits need, ``"op"`` down to torch's own layers.
        inputs: names of optional parameters of the forward that become inputs without an example.

    Returns:
        A ``GraphModule`` whose state dict is that of ``model``, key for key, with the same tensors.

    Raises:
        CaptureError: the forward of an opened module can't be traced; the model is as it was.
    """
    if granularity not in ("auto", "op"):
        raise CaptureError(f"There is no granularity {granularity!r}.", hint="use 'auto' or 'op'")
    if isinstance(model, CollabGraphModule):
        return _adopt(model, model.modes)
    if isinstance(model, fx.GraphModule):
        return _adopt(model, Modes(model.graph, model.graph))
    _refuse_lazy_modules(model)
    interface = interface_of(model, example_inputs, inputs)
    opened = opened_paths(model, splits)
    traced = model.modules() if granularity == "op" else [model.get_submodule(path) for path in opened]
    traced, operators = list(traced), granularity == "op"
    with preserved(model.modules()):
        set_mode(traced, True)
        tracer = LazyTracer(opened, interface, operators=operators)
        train = _trace(tracer, model)
    with preserved(model.modules()):  # apart: what the forward sets in one mode must not be seen in the other
        set_mode(traced, False)
        tracer = LazyTracer(opened, interface, operators=operators, constants=tracer.constants)
        evaluation = _trace(tracer, model)
    captured = CollabGraphModule(model, Modes.merged(train, evaluation), constants=tracer.constants)
    opened_modules = {path: model.get_submodule(path) for path in sorted(opened)}
    captured.meta[NOTES_KEY] = given_up(opened_modules, interface)
    return captured


def opened_paths(model: nn.Module, splits: Iterable[str]) -> frozenset[str]:
    """The root and every module that properly contains a split; names that are no modules open nothing."""
    modules = dict(model.named_modules(remove_duplicate=False))
    canonical = {module: path for path, module in reversed(modules.items())}  # a graph uses the first path
    opened = {""}
    for split in splits:
        for part in split.split("+"):
            path = part.strip().partition("@")[0]
            if path in modules:
                atoms = path.split(".")[:-1]
                opened |= {canonical[modules[".".join(atoms[: i + 1])]] for i in range(len(atoms))}
    return frozenset(opened)


def _adopt(model: fx.GraphModule, modes: Modes) -> CollabGraphModule:
    captured = CollabGraphModule(model, modes.map(copy_graph))
    captured.meta[NOTES_KEY] = model.meta.get(NOTES_KEY, ())
    return captured


def _trace(tracer: LazyTracer, model: nn.Module) -> fx.Graph:
    try:
        return tracer.trace(model)
    except Exception as error:
        raise CaptureError(
            f"The forward of {type(model).__qualname__} can't be captured.",
            where=_where(error),
            why=readable(f"{type(error).__name__}: {error}"),
            hint="put the splits at modules further out, so that this code stays inside a module kept whole; "
            "or move the code that asks for values into a module of its own",
        ) from error


def _where(error: BaseException) -> str | None:
    """The innermost line of the user's own code."""
    trace, found = error.__traceback__, None
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if not belongs_to_the_machinery(file):
            found = f"{file}:{line}, in {trace.tb_frame.f_code.co_qualname}"
        trace = trace.tb_next
    return found


def _refuse_lazy_modules(model: nn.Module) -> None:
    names = [name for name, tensor in model.named_parameters() if torch.nn.parameter.is_lazy(tensor)]
    if names:
        raise CaptureError(
            "The model has parameters without a shape.",
            where=", ".join(names[:4]),
            why="lazy modules get their parameters at the first call",
            hint="call the model once on an example, then transform it",
        )
