"""The values through which every gradient passes, one after the other: where a model can be cut at one value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from torch import fx

from fxcollab.analysis.levels import state_tensors
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.profile import Profile
from fxcollab.fx_utils import get_output

K = TypeVar("K", fx.Node, str)
N = TypeVar("N", int, float)


@dataclass(frozen=True, eq=False)
class Chain:
    """A captured model as a chain of values.

    Attributes:
        captured: the captured model.
        costs: the profile of its train mode's graph.
        values: the nodes that dominate the output, in the order of the data flow.
        places: for each node, and for each name of a parameter or buffer, how many of the values it lies behind. What
            doesn't depend on an input lies where it is first used.
    """

    captured: CollabGraphModule
    costs: Profile
    values: tuple[fx.Node, ...]
    places: Mapping[fx.Node | str, int]

    def before(self, numbers: Mapping[K, N]) -> list[N]:
        """The sums of what lies before each value, and last that of everything."""
        sums: list[Any] = [0] * (len(self.values) + 1)
        for key, number in numbers.items():
            sums[self.places[key]] += number
        return list(accumulate(sums))


def chain_of(captured: CollabGraphModule, costs: Profile) -> Chain:
    """The chain of a captured model, in train mode."""
    values = _dominators(captured, costs)
    behind = _behind(captured.modes.train, values)
    first: dict[int, int] = {}
    for node, place in behind.items():
        for tensor in state_tensors(node, captured).values():
            first[id(tensor)] = min(place, first.get(id(tensor), place))
    places: dict[Any, int] = {**behind}
    for name, tensor in (*captured.named_parameters(), *captured.named_buffers()):
        places[name] = first.get(id(tensor), 0)
    return Chain(captured, costs, values, places)


def narrowest(chain: Chain) -> tuple[fx.Node, ...]:
    """The fewest values that together cut the model, as near to the middle of the work as possible; () for none."""
    nodes = chain.costs.nodes
    carries = carriers(chain.captured, chain.costs) & of_inputs(chain.captured.modes.train)
    sources = [node for node in carries if carries.isdisjoint(node.all_input_nodes)]
    last = {node: max((user for user in node.users if user in carries), default=node) for node in carries}
    total = sum(cost.forward_flops for cost in nodes.values())
    live: list[fx.Node] = []
    cuts: list[tuple[int, float, tuple[fx.Node, ...]]] = []
    done = 0
    for node in chain.captured.modes.train.nodes:
        done += nodes[node].forward_flops
        if node in carries:
            live = [value for value in (*live, node) if last[value] > node]
            if live and done < total and max(sources) <= node:
                cuts.append((len(live), abs(done - total / 2), tuple(live)))
    return min(cuts, key=lambda cut: cut[:2])[2] if cuts else ()


def carriers(captured: CollabGraphModule, costs: Profile) -> set[fx.Node]:
    """The nodes whose values carry gradients, or would if no parameter were frozen."""
    graph = captured.modes.train
    if all(parameter.requires_grad for parameter in captured.parameters()):
        found = {node for node in graph.nodes if costs.nodes[node].differentiable}
    else:
        parameters = {id(parameter) for parameter in captured.parameters()}
        found = set()
        for node in graph.nodes:
            own = any(id(tensor) in parameters for tensor in state_tensors(node, captured).values())
            if costs.nodes[node].floating and (own or not found.isdisjoint(node.all_input_nodes)):
                found.add(node)
    return {node for node in found if node.op != "get_attr"}


def of_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on an input; what is computed from parameters alone is computed where it is used."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _dominators(captured: CollabGraphModule, costs: Profile) -> tuple[fx.Node, ...]:
    """The nodes on every path of gradients from the outputs."""
    import networkx as nx  # takes long to import, and nothing else needs it

    start, end = "start", "end"
    carries = carriers(captured, costs) & of_inputs(captured.modes.train)
    ends = [node for node in _outputs(captured, costs) if node in carries]
    if not ends:
        return ()
    flow = nx.DiGraph((node, end) for node in ends)
    for node in carries:
        sources: set[Any] = carries.intersection(node.all_input_nodes)
        flow.add_edges_from((source, node) for source in sources or {start})
    dominators = nx.immediate_dominators(flow, start)
    chain: list[Any] = []
    value = dominators[end]
    while value is not start:
        chain.append(value)
        value = dominators[value]
    return tuple(value for value in reversed(chain) if costs.nodes[value].shape is not None)


def _outputs(captured: CollabGraphModule, costs: Profile) -> list[fx.Node]:
    """The tensors that are returned; of a model with auxiliary outputs in train mode, those of both modes."""
    train, evaluation = (list(_tensors_of(get_output(g), costs)) for g in (captured.modes.train, captured.modes.eval))
    common = {node.name for node in evaluation}
    return [node for node in train if node.name in common] or train


def _tensors_of(output: fx.Node, costs: Profile) -> Iterator[fx.Node]:
    """The tensors in structures such as named tuples."""
    for node in output.all_input_nodes:
        cost = costs.nodes.get(node)
        if cost is None or cost.shape is not None or node.op == "call_module":
            yield node
        else:
            yield from _tensors_of(node, costs)


def _behind(graph: fx.Graph, values: tuple[fx.Node, ...]) -> dict[fx.Node, int]:
    place = {node: index for index, node in enumerate(values, start=1)}
    behind: dict[fx.Node, int] = {}
    dependent = of_inputs(graph)
    for node in graph.nodes:
        behind[node] = max((place.get(source, behind[source]) for source in node.all_input_nodes), default=0)
    for node in reversed(graph.nodes):
        if node not in dependent and node.users:
            behind[node] = min(behind[user] for user in node.users)
    return behind
