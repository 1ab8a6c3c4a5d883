"""Prune: from the training graph back to one head, which is the captured original again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import codegen_of
from fxcollab.arguments import checked
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.deep_copy import deep_copy
from fxcollab.errors import MixedError, StateError, one_line
from fxcollab.fingerprint import fingerprint
from fxcollab.functional import has_values, refuse_mixed, restored_on_error, shallow, tensors_of
from fxcollab.fx_utils import attribute, map_inputs
from fxcollab.plan import plan_of, training_model
from fxcollab.provenance import META_KEY, provenance_of
from fxcollab.rewriting.other_inputs import OTHER_INPUTS_KEY
from fxcollab.rewriting.outputs import codegen_for_one, output_of
from fxcollab.rewriting.peers import Branch
from fxcollab.rewriting.state_dict import without_infixes
from fxcollab.tracing.capture import CAPTURE_KEY, CaptureOptions
from fxcollab.tree import HeadTree, Path, branch_name

M = TypeVar("M", bound=nn.Module)


@overload
def prune(train_model: nn.Module, head: int = 0) -> CollabGraphModule: ...
@overload
def prune(train_model: nn.Module, head: int = 0, *, into: M) -> M: ...
@checked
def prune(train_model: nn.Module, head: int = 0, *, into: nn.Module | None = None) -> nn.Module:
    """Keep one head, discard the others.

    The inference graph is derived from the training graph: of its nodes, those on the path of ``head`` stay, in the
    captured graph's order, what the rewrite inserted is taken out, and each regains its original name and state.
    What other passes have edited or added in this head stays so.

    Args:
        train_model: what `transform` returned; wrapped by DDP or ``torch.compile`` is fine.
        head: the head to keep; 0 is the caller's own.
        into: a model to load the head's weights and buffers into instead, such as the original object (default
            None). Note that the training model's trunk and head 0 share their state with the original.

    Returns:
        The captured original, node for node, over this head's own tensors (no copies); or ``into``. Its modules, and
        so its train or eval mode, are its own, except for those of TorchScript. To convert it to another type or
        device, copy it first: ``copy.deepcopy(pruned)``. After ``load_state_dict(..., assign=True)``, which replaces
        the training model's tensors, prune again.

    Raises:
        PatternError: there is no such head.
        StateError: ``into`` is another model, and was not changed; an added node reads values of several heads; or
            a module or tensor of this head was deleted, or replaced by another head's.
    """
    model = training_model(train_model)
    plan = plan_of(model)
    path, peers = plan.tree.head_path(head), plan.options.peers
    modes = model.modes.map(lambda graph: prune_graph(graph, plan.tree, path, peers))
    root = model.own_root()
    if any(path):
        names = (branch_name(path[:level]) for level in range(1, len(path) + 1) if any(path[:level]))
        root = _graft(root, [_branch(model, f"{peers}.{name}") for name in names])
    _refuse_others(model, root, path, peers)
    constants = {name: getattr(model, name) for name in model.constants}
    pruned = CollabGraphModule(
        with_own_modules(root),
        modes,
        constants=constants,
        fixed=model.fixed,
        other_inputs=model.meta.get(OTHER_INPUTS_KEY),
    )
    pruned.meta[CAPTURE_KEY] = CaptureOptions(plan.granularity, plan.interface, captured=fingerprint(modes))
    if into is None:
        return pruned
    return _load(into, pruned.state_dict(), dict(pruned.named_buffers(remove_duplicate=False)))


def _branch(model: CollabGraphModule, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise _gone(name, "the head") from error


def _refuse_others(model: CollabGraphModule, root: nn.Module, path: Path, peers: str) -> None:
    """Raise unless every node of a head has, in the pruned model, the tensors that it has in training.

    It hasn't where they were deleted, or where an edit made the node call another head's: under the name that is
    left there would be head 0's.
    """
    for graph in model.modes:
        for node, origin in provenance_of(graph, peers).items():
            is_kept = not origin.inserted and origin.branch == path[: len(origin.branch)]
            if node.op not in ("call_module", "get_attr") or not is_kept or node.target in model.constants:
                continue
            called = _found(model, str(node.target))
            if called is None:
                raise _gone(str(node.target), f"node {node.name!r} of the head at {branch_name(path)}")
            if not origin.functional and not _is_same(_found(root, str(origin.target)), called):
                raise StateError(
                    f"The head at {branch_name(path)} calls {str(node.target)!r}, which belongs to another.",
                    where=f"node {node.name!r}",
                    why="the training graph was edited so that one head has another's modules or tensors",
                    hint="let every head call its own, or edit the graph after pruning",
                )


def _found(root: nn.Module, path: str) -> Any:
    try:
        return attribute(root, path)
    except AttributeError:
        return None


def _is_same(one: Any, other: Any) -> bool:
    """Whether they are one object, or a module and a copy of it over the same tensors."""
    if not isinstance(one, nn.Module) or type(one) is not type(other):
        return one is other
    ids = ({name: id(tensor) for name, tensor in tensors_of(module).items()} for module in (one, other))
    return next(ids) == next(ids)


def _gone(name: str, where: str) -> StateError:
    return StateError(
        f"The training model has no {name!r} any more.",
        where=where,
        why="it was deleted or renamed after the transform, and another head's must not take its place",
        hint="prune the training model as transform or load returned it",
    )


def with_own_modules(root: nn.Module) -> nn.Module:
    """The module with others in it, and itself another, over the same registries of parameters and buffers."""
    scripted = (part for part in root.modules() if isinstance(part, torch.jit.ScriptModule))  # copies copy tensors
    own: nn.Module = deep_copy(root, lambda tensor: tensor, scripted, share_functions=True)[0]
    for old, new in zip(root.modules(), own.modules(), strict=True):
        if old is not new:  # what is assigned to one, or converted in one, is seen in the other
            new.__dict__.update(_parameters=old._parameters, _buffers=old._buffers)
    return own


def prune_graph(graph: fx.Graph, tree: HeadTree, path: Path, peers: str) -> fx.Graph:
    """The inference graph of the head at ``path``, derived from a training graph.

    Raises:
        StateError: a node reads a value of another head, or of several.
    """
    provenance = provenance_of(graph, peers)
    new = fx.Graph()
    kept: dict[fx.Node, fx.Node] = {}

    def value(node: fx.Node) -> fx.Node:
        while provenance[node].inserted:
            node = node.all_input_nodes[0]
        if node not in kept:
            raise StateError(
                f"The head at {branch_name(path)} reads {node.name!r}, which belongs to another.",
                where=f"{node.op} {node.target}",
                why="the training graph was edited so that one head reads another",
                hint="let every head read values of its own, or edit the graph after pruning",
            )
        return kept[node]

    for node in sorted(graph.nodes, key=lambda node: provenance[node].position):
        origin = provenance[node]
        if origin.kind == "output":
            result = map_inputs(output_of(graph, tree, path), value)
            output = new.create_node("output", "output", (result,), name=origin.origin, type_expr=origin.target)
            output.meta = _without_provenance(node)
        elif not origin.inserted and origin.branch == path[: len(origin.branch)]:
            args = node.args[1:] if origin.functional else node.args
            kept[node] = new.create_node(
                node.op,
                origin.target,
                map_inputs(args, value),
                map_inputs(node.kwargs, value),
                name=origin.origin,
                type_expr=node.type,
            )
            kept[node].meta = _without_provenance(node)
    new.set_codegen(codegen_for_one(codegen_of(graph)))
    return new


def _without_provenance(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key != META_KEY}


def _graft(module: nn.Module, branches: list[nn.Module]) -> nn.Module:
    """A copy of ``module`` in which the peers of ``branches`` replace their originals."""
    new = shallow(module)
    for branch in branches:
        new._parameters.update(branch._parameters)
        new._buffers.update(branch._buffers)
    for name in dict.fromkeys([*module._modules, *(name for branch in branches for name in branch._modules)]):
        peers = [branch._modules[name] for branch in branches if branch._modules.get(name) is not None]
        whole = [peer for peer in peers if not isinstance(peer, Branch)]
        if whole:
            new._modules[name] = whole[-1]
        elif peers:
            child = module._modules[name]
            assert child is not None
            new._modules[name] = _graft(child, [peer for peer in peers if peer is not None])
    return new


def _load(model: M, state: dict[str, Any], buffers: Mapping[str, Tensor]) -> M:
    """Load ``state``, and the ``buffers`` that it lacks, into ``model``, if all fits; its parts may be compiled."""
    own = model.state_dict()
    names = {without_infixes(key): key for key in own}
    state = {names.get(without_infixes(key), key): value for key, value in state.items()}
    missing = [*(key for key in state if key not in own), *(key for key in own if key not in state)]
    shapes = {key: [getattr(each.get(key), "shape", None) for each in (own, state)] for key in state}
    missing += [key for key in state if key in own and not _is_like(own[key], state[key])]
    wrong = missing or [key for key, (one, other) in shapes.items() if one != other]
    own.update(state)  # which has the version of the format
    if missing or (wrong and not _takes(model, own)):
        raise StateError(
            f"The head's weights don't fit {type(model).__qualname__}.",
            where=", ".join(wrong[:4]),
            why="these are missing in one of the two, or have another shape or type; nothing was written",
            hint="give the model that was transformed, or a new one like it",
        )
    if not has_values(model):
        raise StateError(
            f"{type(model).__qualname__} has no values into which a head's could be loaded.",
            why="it is on the meta device",
            hint="model.to_empty(device='cpu') first; or model.load_state_dict(fxcollab.prune_state_dict("
            "train_model.state_dict(), head), assign=True)",
        )
    try:
        with restored_on_error(model):
            model.load_state_dict(own)
            for name, buffer in model.named_buffers(remove_duplicate=False):
                kept = buffers.get(without_infixes(name)) if name not in own else None
                if kept is not None and kept.shape != buffer.shape:  # as of a cache that has grown
                    buffer.data = kept.to(buffer, copy=True)
                elif kept is not None and not torch.equal(kept.to(buffer), buffer):
                    buffer.copy_(kept)  # expanded ones can't be written into, and are equal mostly
            refuse_mixed(model, _of_all_buffers(model, buffers) | state)
    except MixedError:
        raise
    except Exception as error:  # a hook of the model, or a tensor that can't be written
        raise StateError(
            f"The head's weights can't be loaded into {type(model).__qualname__}.",
            why=one_line(error),
            hint="the model is as it was: can it load its own state_dict()? Buffers of expand() need contiguous()",
        ) from error
    return model


def _of_all_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    names = (name for name, _ in model.named_buffers(remove_duplicate=False))
    return {name: buffers[without_infixes(name)] for name in names if without_infixes(name) in buffers}


def _is_like(one: Any, other: Any) -> bool:
    """Whether one's values can be written into the other: among floating-point or complex types into any."""
    types = [getattr(value, "dtype", torch.float32) for value in (one, other)]
    kinds = {(dtype.is_floating_point, dtype.is_complex) for dtype in types}
    return types[0] == types[1] or kinds in ({(True, False)}, {(False, True)})


def _takes(model: nn.Module, state: dict[str, Any]) -> bool:
    """Whether the model loads tensors of other shapes, as observers of quantization do."""
    try:
        copy.deepcopy(model).load_state_dict(state)
    except RuntimeError:
        return False
    return True
