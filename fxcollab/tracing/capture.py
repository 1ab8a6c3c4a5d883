"""Capture: a model becomes a graph; only modules that contain a split are traced into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from fxcollab._torch import PyTreeCodeGen, codegen_of, is_compiled
from fxcollab.arguments import checked
from fxcollab.codegen.fixed import Fixed
from fxcollab.codegen.modes import Modes
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import CaptureError
from fxcollab.fingerprint import fingerprint
from fxcollab.runtime.operators import guard
from fxcollab.tracing.attempts import Request, trace_modes
from fxcollab.tracing.interface import ExampleInputs, Interface, forward_of, interface_of
from fxcollab.tracing.limitations import limitations
from fxcollab.tracing.patches import overrides_call

Granularity = Literal["auto", "op"]
LIMITATIONS_KEY = "fxcollab_limitations"
CAPTURE_KEY = "fxcollab_capture"


@dataclass(frozen=True)
class CaptureOptions:
    """How a model was captured; ``captured.meta[CAPTURE_KEY]``.

    ``fingerprint`` is that of the graph of eval mode, where it has guards; ``captured`` that of the graphs of both
    modes, by which edits are noticed.
    """

    granularity: Granularity
    interface: Interface
    example_inputs: ExampleInputs | None = None
    fingerprint: str | None = None
    captured: str | None = None


@checked
def capture(
    model: nn.Module,
    splits: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
    granularity: Granularity = "auto",
    *,
    interface: Interface | None = None,
) -> CollabGraphModule:
    """Capture a model as a graph over its own modules.

    Only the modules that contain a split are traced into; every other module is a leaf module: one node, the same
    object with its hooks, parametrizations and train/eval behaviour. Both modes are traced: if a forward reads
    ``self.training``, the captured module follows ``.train()`` and ``.eval()``.

    Args:
        model: any module, on any device; a ``GraphModule`` is taken as it is and never traced again.
        splits: split names (default none); the modules around them are opened, that is traced into.
        example_inputs: tuple or dict (default None). Tensors in it become inputs, also for optional parameters; other
            values are fixed. Where a forward needs concrete values while it is traced, it gets those of the examples.
        granularity: ``"auto"`` opens only what the splits need, ``"op"`` everything down to torch's own layers.
        interface: that of an earlier capture, to be used again without examples (default None).

    Returns:
        A ``GraphModule`` whose state dict is that of ``model``, key for key, with the same tensors.

    Raises:
        ForwardError: The forward of an opened module can't be traced; the model is restored.
        CaptureError: The model has no inputs, or parameters without a shape.
    """
    if granularity not in ("auto", "op"):
        raise CaptureError(f"There is no granularity {granularity!r}.", hint="use 'auto' or 'op'")
    _check_call(model)
    _check_names(model)
    interface = interface or interface_of(model, example_inputs)
    interface.check(model)
    options = CaptureOptions(granularity, interface, example_inputs)
    if isinstance(model, fx.GraphModule):
        return _adopt(model, options)
    _check_initialized(model)
    if not interface.inputs:
        raise CaptureError(
            f"{type(model).__qualname__} has no required input, so that the inputs of its graph are not known.",
            where=forward_of(model),
            hint="give example_inputs: a tuple or a dict of the inputs that you train with",
        )
    request = Request(model, opened_paths(model, splits), interface, granularity == "op", example_inputs)
    train, evaluation = trace_modes(request)
    captured = CollabGraphModule(
        model,
        Modes.merged(train.graph, evaluation.graph),
        constants=evaluation.constants,
        fixed=Fixed(train.attributes, evaluation.attributes, interface.fixed_arguments(model)),
    )
    guarded = any(node.target is guard for node in evaluation.graph.nodes)
    traced = fingerprint([captured.modes.eval]) if guarded else None
    captured.meta[CAPTURE_KEY] = replace(options, fingerprint=traced, captured=fingerprint(captured.modes))
    captured.meta[LIMITATIONS_KEY] = (
        *limitations({**train.opened, **evaluation.opened}, interface),
        *dict.fromkeys((*train.notes, *evaluation.notes)),  # each once
    )
    return captured


def opened_paths(model: nn.Module, splits: Iterable[str]) -> frozenset[str]:
    """The paths of the root and of every module that contains a split.

    That is the module around the one that is named, or the module itself in the forward of which a value is named.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    canonical = {module: path for path, module in reversed(modules.items())}  # the graph uses the first path
    named = {part.strip().partition("@")[0] for split in splits for part in split.split("+")}
    cut = {modules[path] for path in named if path in modules}
    aliases = (path for path, module in modules.items() if module in cut)  # all names of each
    owners = {path.rpartition(".")[0] for path in (*named, *aliases)} & modules.keys()
    around = (accumulate(owner.split("."), "{}.{}".format) for owner in owners if owner)
    return frozenset({"", *(canonical[modules[outer]] for outers in around for outer in outers)})


def _adopt(model: fx.GraphModule, options: CaptureOptions) -> CollabGraphModule:
    modes = Modes.of_graph_module(model)
    for graph in modes:
        _check_codegen(codegen_of(graph))
    captured = CollabGraphModule(model, modes)
    captured.meta[CAPTURE_KEY] = replace(options, captured=fingerprint(captured.modes))
    captured.meta[LIMITATIONS_KEY] = getattr(model, "meta", {}).get(LIMITATIONS_KEY, ())
    return captured


def _check_codegen(codegen: CodeGen) -> None:
    if type(codegen) not in (CodeGen, PyTreeCodeGen):
        raise CaptureError(
            f"The graph generates its code with {type(codegen).__qualname__}.",
            why="it is not known how such a graph returns several outputs",
            hint="give the module itself, or torch.export.export(model, inputs).module()",
        )


def _check_call(model: nn.Module) -> None:
    if overrides_call(model):
        compiled = is_compiled(model)
        raise CaptureError(
            f"{type(model).__qualname__} {'is compiled' if compiled else 'overrides __call__'}.",
            where=f"{type(model).__qualname__}.__call__",
            why="a graph has what the forward does, and nothing of what is around it",
            hint="give the model that was compiled, and compile the training model"
            if compiled
            else "put the model into a module whose forward calls it, as in nn.Sequential(model), and transform that",
        )


def _check_names(model: nn.Module) -> None:
    for path, _ in model.named_modules():
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise CaptureError(
                f"A module can't be called {path!a}.",
                why="half of a character is in its name, and the generated code has it",
                hint="give it another name",
            ) from error


def _check_initialized(model: nn.Module) -> None:
    names = [name for name, tensor in nn.Module.named_parameters(model) if torch.nn.parameter.is_lazy(tensor)]
    if names:
        raise CaptureError(
            "The model has parameters without a shape.",
            where=", ".join(names[:4]),
            why="lazy modules get their parameters at the first call",
            hint="call the model once on an example, then transform it",
        )
