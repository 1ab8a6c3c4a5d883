"""Computes the difference from a training model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import fx, nn

from fxcollab.analysis.levels import state_tensors
from fxcollab.arguments import checked
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.original import ProfiledOriginal, profile_original
from fxcollab.costs.profile import NodeCost
from fxcollab.costs.summary import summarise
from fxcollab.diffs.compare import Comparison, captured_like, compare
from fxcollab.diffs.diff import Diff
from fxcollab.diffs.model import DiffNode
from fxcollab.errors import DiffError
from fxcollab.functional import tensors_of
from fxcollab.fx_utils import opened_module, source_line
from fxcollab.plan import PLAN_KEY, Plan, plan_of, training_model
from fxcollab.provenance import Provenance, provenance_of
from fxcollab.runtime.functional_call import FunctionalCall
from fxcollab.tracing.capture import LIMITATIONS_KEY


@overload
def diff(
    train_model: nn.Module,
    other: None = None,
    *,
    training: bool = True,
    counted: ProfiledOriginal | None = None,
) -> Diff: ...
@overload
def diff(
    train_model: nn.Module,
    other: nn.Module,
    *,
    training: bool = True,
    counted: ProfiledOriginal | None = None,
) -> Diff | Comparison: ...
@checked
def diff(
    train_model: nn.Module,
    other: nn.Module | None = None,
    *,
    training: bool = True,
    counted: ProfiledOriginal | None = None,
) -> Diff | Comparison:
    """The difference between a training model and its inference graph, or any two graphs.

    Args:
        train_model: what `transform` or `load` returned; wrapped by DDP or ``torch.compile`` is fine. With another
            model also what `capture` or `prune` returned, any ``fx.GraphModule``, or a module that can be captured.
        other: None, what `prune` returned, or the original: the training graph is shown beside the inference graph of
            head 0, against which ``other`` is checked. Any other model: the two graphs are compared node by node.
        training: train mode's graph, or eval mode's where they differ (default True).
        counted: the profile of its original, if it was made before (default None).

    Raises:
        StateError: it is not a training model, or another pass inserted nodes.
        DiffError: the two graphs have hardly a node in common.
    """
    if other is not None and not _is_training_model(train_model):
        return compare(train_model, other, training=training)
    model = training_model(train_model)
    plan, counted = plan_of(model), counted or profile_original(model)
    if other is not None and _is_training_model(other):
        return compare(model, training_model(other), training=training)
    if other is not None:
        like = captured_like(other, plan)
        if not all(_equal(counted.captured, like, mode) for mode in {training, True}):
            return compare(model, like, training=training)
    graph, original = model.modes.of(training), counted.captured.modes.of(training)
    known = counted.profile is not None and original is counted.captured.modes.train
    costs = {node.name: cost for node, cost in counted.profile.nodes.items()} if counted.profile and known else {}
    origins = {node.name: node for node in original.nodes}
    counter = _Parameters(model)
    provenance = provenance_of(graph, plan.options.peers)
    summary = summarise(model, counted)
    return Diff(
        plan.pattern,
        plan.tree,
        training,
        _named(plan, model),
        summary.parameters,
        (summary.costs.original.flops, summary.costs.training.flops) if summary.costs else None,
        tuple(_node(node, found, origins, counted.captured, costs, counter) for node, found in provenance.items()),
        counted.inputs if known else None,
        counted.unknown if known or counted.unknown else "only train mode's graph is counted",
        tuple(model.meta.get(LIMITATIONS_KEY, ())),
    )


def _is_training_model(model: nn.Module) -> bool:
    return any(PLAN_KEY in part.meta for part in model.modules() if isinstance(part, CollabGraphModule))


def _equal(captured: CollabGraphModule, other: CollabGraphModule, training: bool) -> bool:
    try:
        return not compare(captured, other, training=training).hunks
    except DiffError:
        return False


class _Parameters:
    """Counts the values of parameters, those that a node before has as none of the node's own."""

    def __init__(self, model: CollabGraphModule) -> None:
        self._model = model
        self._seen: set[int] = set()

    def of(self, node: fx.Node) -> tuple[int, int]:
        """How many a node of the training graph has, and how many of them no node before it has."""
        called = self._model.get_submodule(str(node.target)) if node.op == "call_module" else None
        found = tensors_of(called.module) if isinstance(called, FunctionalCall) else state_tensors(node, self._model)
        tensors = found.values()
        values = {id(tensor): tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter)}
        new = sum(count for key, count in values.items() if key not in self._seen)
        self._seen |= values.keys()
        return sum(values.values()), new


def _node(
    node: fx.Node,
    found: Provenance,
    origins: Mapping[str, fx.Node],
    captured: CollabGraphModule,
    costs: Mapping[str, NodeCost],
    counter: _Parameters,
) -> DiffNode:
    origin = origins.get(found.origin, node)  # another pass may have added it to one head
    cost = costs.get(found.origin)
    own = not found.inserted and found.kind != "output"
    parameters, new = counter.of(node) if own else (0, 0)
    return DiffNode(
        name=node.name,
        kind=found.kind,
        counterpart=None if found.inserted else found.origin,
        origin=found.origin,
        path=found.branch,
        op=node.op,
        label=found.kind if found.inserted else _label(origin, captured),
        target=_text(origin.target) if not found.inserted else _text(found.target),
        module=opened_module(origin),
        inputs=tuple(dict.fromkeys(source.name for source in node.all_input_nodes)),
        factor=float(node.args[1]) if found.kind == "rescale" else None,  # type: ignore[arg-type]
        shape=cost.shape if cost and found.kind not in ("state", "output") else None,
        dtype=cost.dtype if cost and found.kind not in ("state", "output") else None,
        parameters=parameters,
        new_parameters=new,
        flops=cost.forward_flops if cost and own else None,
        source=_place(origin),
        rewired=not found.inserted and not any(found.branch) and _reads_other_values(node, origin),
    )


def _reads_other_values(node: fx.Node, origin: fx.Node) -> bool:
    return [source.name for source in node.all_input_nodes] != [source.name for source in origin.all_input_nodes]


def _named(plan: Plan, model: CollabGraphModule) -> str:
    """The model's name: of the function that makes it, in a library, of its class."""
    source = plan.source
    library = source.location if source and source.kind in ("torchvision", "timm", "hf") else None
    return (source and source.name) or (library and library.rsplit("/", 1)[-1]) or type(model.root).__name__


def _label(node: fx.Node, captured: CollabGraphModule) -> str:
    if node.op == "call_module":
        return type(captured.get_submodule(str(node.target))).__name__
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "state"
    return str(getattr(node.target, "__name__", node.target))


def _place(node: fx.Node) -> str | None:
    """``torchvision/models/resnet.py:273``: libraries' files by their package, the user's own by their names."""
    found = re.match(r'File "(.*)", line (\d+)', source_line(node) or "")
    if found is None:
        return None
    file, line = Path(found[1]), found[2]
    parts = file.parts[file.parts.index("site-packages") + 1 :] if "site-packages" in file.parts else (file.name,)
    return f"{'/'.join(parts)}:{line}"


def _text(target: Any) -> str:
    return target if isinstance(target, str) else torch.typename(target) if callable(target) else str(target)
