"""The points at which a model can be cut at one value, and what lies before and behind each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn

from fxcollab.capture.capture import Granularity
from fxcollab.capture.examples import UNTOLD, USUAL_IMAGES, guess_inputs
from fxcollab.capture.interface import ExampleInputs, Interface, interface_of
from fxcollab.capture.tracer import RETURNED_BY
from fxcollab.choice.openings import opened
from fxcollab.codegen import CollabGraphModule
from fxcollab.costs.profile import Profile, profile
from fxcollab.errors import CaptureError
from fxcollab.graphs import get_output
from fxcollab.partition.levels import state_tensors


@dataclass(frozen=True)
class Candidate:
    """A point at which the model can be cut at one value.

    Attributes:
        name: the split's name: of the outermost module that returns the value, or of its node.
        is_module: whether that is a module's.
        shape, dtype: of the value; None where it is no single tensor.
        flops: of a forward, up to the cut, and behind it.
        parameters: the number of values in parameters, before and behind.
        activations: bytes that are kept for the backward, before and behind.
        run: which of how many candidates in a row that have this shape: (3, 6). Where a stage ends, it is the last.
        ends_stage: whether the value's shape changes behind it, where something that learns lies in the stage.
    """

    name: str
    is_module: bool
    shape: tuple[int, ...] | None
    dtype: str | None
    flops: tuple[int, int]
    parameters: tuple[int, int]
    activations: tuple[int, int]
    run: tuple[int, int] = (1, 1)
    ends_stage: bool = False

    @property
    def share(self) -> float:
        """The part of the forward's operations that lies before the cut, from 0 to 1."""
        total = sum(self.flops)
        return self.flops[0] / total if total else 0.0


def find_splits(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    granularity: Granularity = "auto",
    depth: int | None = None,
) -> tuple[Candidate, ...]:
    """Every point at which ``model`` can be cut at one value, in the order of the data flow.

    Nothing is computed: all is counted on fake tensors, in train mode, at the shapes of ``example_inputs`` or of a
    usual input that fits.

    Args:
        model: any module on any device, meta included.
        example_inputs: tuple or dict, as for `transform`.
        granularity: ``auto`` looks between modules, ``op`` between all operations.
        depth: open all modules down to so many levels below the root; by default those that do more than an eighth
            of the work.

    Returns:
        The candidates; none where every cut has several values that carry gradients.

    Raises:
        CaptureError: no input is known, the model's own forward can't be captured, or it asks for data.
    """
    interface = known_interface(model, example_inputs)
    try:
        captured = opened(model, interface, example_inputs, granularity, depth)
        return candidates(captured, profile(captured, interface))
    except UNTOLD as error:
        raise CaptureError(
            f"What {type(model).__qualname__} costs can't be counted.",
            where=f"{type(model).__qualname__}.forward",
            why=f"it asks for the data themselves, and fake tensors have none: {error}",
            hint="name the splits yourself",
        ) from error


def known_interface(model: nn.Module, example_inputs: ExampleInputs | None) -> Interface:
    """The interface under which ``model`` is captured, with all shapes: of the examples, or guessed.

    Raises:
        CaptureError: no usual input fits.
    """
    interface = interface_of(model, example_inputs)
    return interface if interface.known else guess_inputs(model, USUAL_IMAGES, known=interface)


def candidates(captured: CollabGraphModule, costs: Profile) -> tuple[Candidate, ...]:
    """The candidates of a captured model, by the profile of its train mode's graph."""
    graph = captured.modes.train
    chain = _chain(graph, costs)
    found = [_Counted(captured, graph, costs, chain).candidate(index) for index in range(len(chain))]
    return tuple(_with_stages([c for c in found if c.parameters[1]]))


def _chain(graph: fx.Graph, costs: Profile) -> list[fx.Node]:
    """The nodes through which all that learns reaches the output: the output's dominators."""
    import networkx as nx  # takes long to import, and nothing else needs it

    flow = nx.DiGraph()
    carries = {node for node in graph.nodes if costs.nodes[node].differentiable and node.op != "get_attr"}
    for node in graph.nodes:
        if node in carries:
            sources = [source for source in node.all_input_nodes if source in carries]
            flow.add_edges_from((source, node) for source in sources or [_START])
    end = _last(graph, carries, costs)
    if end is None:
        return []
    dominators = nx.immediate_dominators(flow, _START)
    chain: list[Any] = [end]
    while dominators.get(chain[-1], _START) is not _START:
        chain.append(dominators[chain[-1]])
    return [node for node in reversed(chain) if costs.nodes[node].shape is not None]


_START = "start"


def _last(graph: fx.Graph, carries: set[fx.Node], costs: Profile) -> fx.Node | None:
    """The value of the output behind which most of the work lies: not that of an auxiliary head."""
    outputs = [node for node in _tensors_of(get_output(graph), costs) if node in carries]
    return max(outputs, key=lambda node: _work_before(node, costs), default=None)


def _tensors_of(output: fx.Node, costs: Profile) -> Iterator[fx.Node]:
    """The tensors that structures such as named tuples are made of."""
    for node in output.all_input_nodes:
        if costs.nodes[node].shape is not None or node.op == "call_module":
            yield node
        else:
            yield from _tensors_of(node, costs)


def _work_before(node: fx.Node, costs: Profile) -> int:
    seen, waiting, work = {node}, [node], 0
    while waiting:
        current = waiting.pop()
        work += costs.nodes[current].forward_flops
        new = [source for source in current.all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    return work


class _Counted:
    """Sums over what lies behind each value of the chain: level k is behind the first k of them."""

    def __init__(
        self, captured: CollabGraphModule, graph: fx.Graph, costs: Profile, chain: Sequence[fx.Node]
    ) -> None:
        self._captured, self._costs, self._chain = captured, costs, chain
        self._names = _names(graph, captured.root)
        levels = _levels(graph, chain)
        self._flops, self._parameters, self._activations = ([0] * (len(chain) + 1) for _ in range(3))
        state: dict[int, tuple[Tensor, int]] = {}
        parameters = {id(parameter) for parameter in captured.parameters()}
        for node in graph.nodes:
            self._flops[levels[node]] += costs.nodes[node].forward_flops
            for tensor in state_tensors(node, captured).values():
                if id(tensor) in parameters:
                    known = state.get(id(tensor), (tensor, levels[node]))[1]
                    state[id(tensor)] = tensor, min(known, levels[node])
        for tensor, level in state.values():
            self._parameters[level] += tensor.numel()
        for allocation in costs.allocations:
            if allocation.born[0] == "forward" and allocation.died is not None and allocation.died[0] == "backward":
                self._activations[levels[allocation.born[1]]] += allocation.bytes

    def candidate(self, index: int) -> Candidate:
        node = self._chain[index]
        cost = self._costs.nodes[node]
        name, is_module = self._names.get(node, (node.name, False))
        flops, parameters, activations = (
            (sum(counts[: index + 1]), sum(counts[index + 1 :]))
            for counts in (self._flops, self._parameters, self._activations)
        )
        return Candidate(name, is_module, cost.shape, cost.dtype, flops, parameters, activations)


def _levels(graph: fx.Graph, chain: Sequence[fx.Node]) -> Mapping[fx.Node, int]:
    """Behind how many values of the chain each node lies; what no input feeds lies where it is used."""
    place = {node: index for index, node in enumerate(chain, start=1)}
    levels: dict[fx.Node, int] = {}
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        levels[node] = max((place.get(s, levels[s]) for s in node.all_input_nodes), default=0)
        if node.op == "placeholder" or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    for node in reversed(graph.nodes):
        if node not in fed and node.users:
            levels[node] = min(levels[user] for user in node.users)
    return levels


def _names(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, tuple[str, bool]]:
    """The split's name for each value that a module returns: the outermost module's."""
    calls: dict[str, int] = {}
    names: dict[fx.Node, tuple[str, bool]] = {}
    for node in graph.nodes:
        returned = [str(call) for call in node.meta.get(RETURNED_BY, ())]
        if node.op == "call_module":
            path = str(node.target)
            calls[path] = calls.get(path, 0) + 1
            returned.append(path if calls[path] == 1 else f"{path}@{calls[path]}")
        if returned:
            names[node] = min(returned, key=lambda name: (name.count("."), len(name))), True
    return names


def _with_stages(found: Sequence[Candidate]) -> list[Candidate]:
    """Candidates in a row that have the same shape are a stage; its last one ends it."""
    ends = [index for index, (one, next_) in enumerate(pairwise(found)) if one.shape != next_.shape]
    counted: list[Candidate] = []
    for start, end in pairwise([-1, *ends, len(found) - 1]):
        stage = found[start + 1 : end + 1]
        before = found[start].parameters[0] if start >= 0 else 0
        learns = bool(stage) and stage[-1].parameters[0] > before
        for place, candidate in enumerate(stage, start=1):
            last = place == len(stage) and end != len(found) - 1
            counted.append(replace(candidate, run=(place, len(stage)), ends_stage=last and learns))
    return counted
