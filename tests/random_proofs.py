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
from fxcollab.errors import CaptureError, PatternError, SplitError
from fxcollab.proof.report import Report
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
    untouched = Untouched(model)
    try:
        splits = _drawn_splits(model, granularity, data)
    except CaptureError as error:
        assert untouched.differences() == []
        return f"refused: {type(error).__name__}: {error.what}"
    fanouts = data.draw(st.lists(st.integers(2, 3), min_size=len(splits), max_size=len(splits)), label="fan-outs")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {"splits": splits, "fanouts": fanouts, "seed": 0, "granularity": granularity}
            try:
                train_model = fxcollab.transform(model, **options)
            except PatternError as error:  # all that learns behind the splits starts as constants
                assert "never differ" in error.what
                train_model = fxcollab.transform(model, **options, init="copy-anyway")
    except (SplitError, CaptureError) as error:
        assert untouched.differences() == []
        assert error.where or error.why, error
        assert error.hint, error
        return f"refused: {type(error).__name__}: {error.what}"
    report = fxcollab.verify(model, train_model, _inputs(network, 5))
    assert untouched.differences() == []
    felt = _modes_that_feel_shared_buffers(network, report)
    failed = [check.name for check in report if not check.ok and not any(mode in check.name for mode in felt)]
    assert not failed, f"{network}\nsplits={splits} fanouts={fanouts} granularity={granularity}\n{report}"
    return "proved" if report else "limitation: buffers that all branches update"


def _modes_that_feel_shared_buffers(network: Network, report: Report) -> tuple[str, ...]:
    """Parts of the names of checks in which a branch sees what the others did to a buffer that they share.

    The vectors of a spectral norm are updated in train mode, what the forward itself counts in eval mode, too.
    """
    if not any("used before and behind a split" in note for note in report.limitations):
        return ()
    evaluated = network.build().eval()
    before = {name: tensor.clone() for name, tensor in evaluated.named_buffers()}
    with torch.no_grad():
        evaluated(*_inputs(network, 5))
    written = any(not torch.equal(tensor, before[name]) for name, tensor in evaluated.named_buffers())
    return ("in train mode", "gradients", *(["in eval mode equals the original with head"] if written else []))


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
    """One or two cuts at nodes of the captured graph, each at one value or at all that are alive.

    The first may be a module inside another one, which is opened for it.
    """
    nested = [path for path, module in model.named_modules() if path.count(".") == 1 and _is_opened(model, path)]
    first = []
    if granularity == "auto" and nested and data.draw(st.booleans(), label="nested"):
        first = [data.draw(st.sampled_from(nested), label="nested split")]
    graph = fxcollab.capture(model, first, granularity=granularity).graph
    nodes = _promising(graph)
    behind = [node for node in nodes if node.target in first]
    nodes = nodes[nodes.index(behind[0]) + 1 :] if behind else nodes
    if not (first or nodes):
        reject()
    count = st.integers(0 if first else 1, min(2 - len(first), len(nodes)))
    places = sorted(data.draw(st.permutations(range(len(nodes))), label="places")[: data.draw(count, label="cuts")])
    return [*first, *(_cut(graph, nodes[place], data.draw(st.booleans(), label="all alive")) for place in places)]


def _is_opened(model: nn.Module, path: str) -> bool:
    """Whether it is in a module with a forward of its own, not in one of torch's."""
    return type(model.get_submodule(path.partition(".")[0])).__name__ == "Inner"


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
