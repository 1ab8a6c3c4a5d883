"""The whole proof for one random network under random splits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxcollab
from fxcollab.errors import CaptureError, SplitError
from tests.random_networks import WIDTH, Network
from tests.untouched import Untouched


def proof_of(network: Network, data: st.DataObject) -> str:
    """``proved``, or ``refused: ...``; networks that don't run by themselves are no examples.

    Raises:
        AssertionError: the proof fails, or the model was changed.
    """
    model = network.build()
    if not _trains(model, _inputs(network, 3)):
        reject()
    granularity: Any = data.draw(st.sampled_from(["auto", "op"]), label="granularity")
    splits = _drawn_splits(model, granularity, data)
    fanouts = data.draw(st.lists(st.integers(2, 3), min_size=len(splits), max_size=len(splits)), label="fan-outs")
    untouched = Untouched(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train_model = fxcollab.transform(model, splits=splits, fanouts=fanouts, seed=0, granularity=granularity)
    except (SplitError, CaptureError) as error:
        assert untouched.differences() == []
        assert error.where or error.why, error
        assert error.hint, error
        return f"refused: {type(error).__name__}: {error.what}"
    report = fxcollab.verify(model, train_model, _inputs(network, 5))
    assert report, f"{network}\nsplits={splits} fanouts={fanouts} granularity={granularity}\n{report}"
    assert untouched.differences() == []
    return "proved"


def _inputs(network: Network, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, WIDTH, generator=generator) for _ in range(network.inputs))


def _trains(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the network itself runs forward and backward in both modes."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        for training in (False, True):
            outputs = model.train(training)(*(x.clone() for x in inputs))
            leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
            sum(leaf.abs().sum() for leaf in leaves).backward() if leaves else None
    except RuntimeError:  # such as a value that a gradient needs, written in place
        return False
    finally:
        model.zero_grad()
        model.load_state_dict(state)
    return True


def _drawn_splits(model: nn.Module, granularity: Any, data: st.DataObject) -> list[str]:
    """One or two cuts at nodes of the captured graph, each at one value or at all that are alive."""
    nested = [path for path, _ in model.named_modules() if "." in path]
    if granularity == "auto" and nested and data.draw(st.integers(0, 3)) == 0:
        return [data.draw(st.sampled_from(nested), label="nested split")]
    graph = fxcollab.capture(model, granularity=granularity).graph
    nodes = _promising(graph)
    if not nodes:
        reject()
    places = data.draw(st.lists(st.integers(0, len(nodes) - 1), min_size=1, max_size=2, unique=True), label="places")
    return [_cut(graph, nodes[place], data.draw(st.booleans(), label="all alive")) for place in sorted(places)]


def _promising(graph: fx.Graph) -> list[fx.Node]:
    """What the output is computed from, with a module still to come."""
    *_, output = graph.nodes
    needed, behind = {output}, set()
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
        if any(user in behind or user.op == "call_module" for user in node.users):
            behind.add(node)
    return [node for node in graph.nodes if node.op.startswith("call") and node in needed & behind]


def _cut(graph: fx.Graph, node: fx.Node, everything: bool) -> str:
    if not everything:
        return str(node.name)
    order = {other: i for i, other in enumerate(graph.nodes)}
    alive = [
        other.name
        for other in graph.nodes
        if other.op.startswith("call")
        and order[other] <= order[node]
        and any(order[user] > order[node] for user in other.users)
    ]
    return "+".join(alive or [node.name])
