"""Checks 1 and 2: the pruned graph is the captured one, and the state is the very same."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fxcollab._torch import storage_id
from fxcollab.analysis.partition import Partition
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import StateError
from fxcollab.functional import tensors_of
from fxcollab.fx_utils import first_difference
from fxcollab.plan import plan_of
from fxcollab.proof.report import Check
from fxcollab.provenance import provenance_of
from fxcollab.rewriting.prune import prune
from fxcollab.tree import branch_name


def check_provenance(train_model: CollabGraphModule) -> Check:
    """Every node belongs to a head: the rewrite made it, or a later pass added it to one."""
    name = "every node belongs to a head"
    try:
        for graph in train_model.modes:
            provenance_of(graph, plan_of(train_model).options.peers)
    except StateError as error:
        return Check(name, False, f"{error.what} {error.why}")
    return Check(name, True, f"{sum(len(graph.nodes) for graph in train_model.modes)} nodes")


def check_graphs(captured: CollabGraphModule, train_model: CollabGraphModule) -> Iterator[Check]:
    """For every head: names, order, op, target, arguments and generated code of the pruned graph."""
    tree = plan_of(train_model).tree
    for head in range(tree.heads):
        name = f"graph of head {head} equals the original's"
        try:
            pruned = prune(train_model, head)
        except StateError as error:
            yield Check(name, False, error.what)
            continue
        modes = (True, False)
        differences = [first_difference(pruned.modes.of(mode), captured.modes.of(mode)) for mode in modes]
        if any(differences):
            yield Check(name, False, differences[0] or differences[1] or "")
        elif pruned.code != captured.code:
            yield Check(name, False, "the generated code differs")
        else:
            sizes = " and ".join(str(len(graph.nodes)) for graph in captured.modes)
            yield Check(name, True, f"{sizes} nodes, node for node, and the same code")


def check_state(model: nn.Module, cut: Partition, train_model: CollabGraphModule) -> Iterator[Check]:
    """Keys, their order, the identity of tensors, and that branches share no state."""
    own, trained = list(model.state_dict()), list(train_model.state_dict())
    yield _equal_lists("state dict begins with the original's", own, trained[: len(own)])
    name = "pruned state dict has the original's keys"
    try:
        pruned = prune(train_model)
    except StateError as error:
        yield Check(name, False, error.what)
    else:
        yield _equal_lists(name, own, list(pruned.state_dict()))
        yield _same_objects(model, train_model, pruned)
    yield _separate_branches(cut, train_model)


def _equal_lists(name: str, expected: list[str], found: list[str]) -> Check:
    if expected == found:
        return Check(name, True, f"{len(expected)} keys in order")
    different = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    where = f"key {different}: {expected[different]} became {found[different]}" if different is not None else "length"
    return Check(name, False, where)


def _same_objects(model: nn.Module, train_model: CollabGraphModule, pruned: CollabGraphModule) -> Check:
    """The training model has the original's tensors, and so has what is pruned from it."""
    name, expected = "pruned tensors are the original's own", tensors_of(model)
    for found in (tensors_of(pruned), tensors_of(train_model)):
        for key, tensor in expected.items():
            if found.get(key) is not tensor:
                why = "was another object transformed? It is fxcollab.original(train_model)"
                return Check(name, False, f"{key} is another tensor ({why})")
    return Check(name, True, f"{len(expected)} tensors, the same objects")


def _separate_branches(cut: Partition, train_model: CollabGraphModule) -> Check:
    """No state behind a split is shared between branches."""
    plan, tensors = plan_of(train_model), tensors_of(train_model)
    name, counted = "every branch has state of its own", 0
    for origin, level in cut.state.items():
        owners: dict[int, str] = {}
        for path in plan.tree.paths(level):
            key = f"{plan.options.peers}.{branch_name(path)}.{origin}" if any(path) else origin
            if key not in tensors:
                return Check(name, False, f"{key} is missing")
            other = owners.setdefault(storage_id(tensors[key]), key)
            if other != key and tensors[key].numel():
                return Check(name, False, f"{key} is {other}")
            counted += any(path)
    return Check(name, True, f"{counted} tensors of peers")
