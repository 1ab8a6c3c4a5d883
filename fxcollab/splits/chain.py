"""The values through which all that learns must pass, one after the other: where a model can be cut at one value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, fx

from fxcollab.analysis.levels import state_tensors
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.profile import Profile
from fxcollab.fx_utils import get_output

K = TypeVar("K")
N = TypeVar("N", int, float)


@dataclass(frozen=True, eq=False)
class Chain:
    """A captured model as a chain of values.

    Attributes:
        captured: the captured model.
        costs: the profile of its train mode's graph.
        values: the nodes that dominate the output, in the order of the data flow.
        behind: for each node, how many of the values it lies behind; what no input feeds lies where it is used.
        state: the same for every parameter and buffer: the least of its uses.
    """

    captured: CollabGraphModule
    costs: Profile
    values: tuple[fx.Node, ...]
    behind: Mapping[fx.Node, int]
    state: Mapping[str, int]

    def sums(self, each: Mapping[K, N], places: Mapping[K, int] | None = None) -> list[N]:
        """Of numbers by node, or by what ``places`` knows: behind none of the values, behind the first, and so on."""
        found: list[Any] = [0] * (len(self.values) + 1)
        known: Mapping[Any, int] = self.behind if places is None else places
        for key, number in each.items():
            found[known[key]] += number
        return found


def chain_of(captured: CollabGraphModule, costs: Profile) -> Chain:
    """The chain of a captured model, in train mode."""
    graph = captured.modes.train
    values = _values(captured, costs)
    behind = _behind(graph, values)
    return Chain(captured, costs, values, behind, _state(captured, behind))


def narrowest(captured: CollabGraphModule, costs: Profile) -> tuple[fx.Node, ...]:
    """The fewest values that cut what learns in two, as near to the middle of the work as can be; () for none."""
    graph = captured.modes.train
    carries = carriers(captured, costs)
    starts = [n for n in carries if not any(source in carries for source in n.all_input_nodes)]
    begun = max(starts, default=None)
    last = {n: max((u for u in n.users if u in carries), default=None) for n in carries}
    total = sum(cost.forward_flops for cost in costs.nodes.values())
    live: dict[fx.Node, None] = {}
    best: tuple[tuple[int, float], tuple[fx.Node, ...]] | None = None
    done = 0
    for node in graph.nodes:
        done += costs.nodes[node].forward_flops
        if node not in carries:
            continue
        live = {n: None for n in (*live, node) if last[n] is not None and last[n] > node}
        if live and done < total and begun <= node:
            found = (len(live), abs(done - total / 2)), tuple(live)
            best = found if best is None or found[0] < best[0] else best
    return best[1] if best else ()


def carriers(captured: CollabGraphModule, costs: Profile) -> set[fx.Node]:
    """The nodes whose values carry gradients, or would if no parameter were frozen."""
    graph = captured.modes.train
    if all(parameter.requires_grad for parameter in captured.parameters()):
        return {node for node in graph.nodes if costs.nodes[node].differentiable and node.op != "get_attr"}
    parameters = {id(parameter) for parameter in captured.parameters()}
    found: set[fx.Node] = set()
    learns: set[fx.Node] = set()
    for node in graph.nodes:
        own = any(id(tensor) in parameters for tensor in state_tensors(node, captured).values())
        if costs.nodes[node].floating and (own or any(source in learns for source in node.all_input_nodes)):
            learns.add(node)
            if node.op != "get_attr":
                found.add(node)
    return found


def _values(captured: CollabGraphModule, costs: Profile) -> tuple[fx.Node, ...]:
    """The nodes through which all that learns reaches the outputs: their dominators."""
    import networkx as nx  # takes long to import, and nothing else needs it

    flow = nx.DiGraph()
    carries = carriers(captured, costs)
    for node in captured.modes.train.nodes:
        if node in carries:
            sources = [source for source in node.all_input_nodes if source in carries]
            flow.add_edges_from((source, node) for source in sources or [_START])
    ends = [node for node in _outputs(captured, costs) if node in carries]
    flow.add_edges_from((node, _END) for node in ends)
    if not ends:
        return ()
    dominators = nx.immediate_dominators(flow, _START)
    chain: list[Any] = [dominators[_END]]
    while chain[-1] is not _START:
        chain.append(dominators[chain[-1]])
    return tuple(value for value in reversed(chain[:-1]) if costs.nodes[value].shape is not None)


_START, _END = "start", "end"


def _outputs(captured: CollabGraphModule, costs: Profile) -> list[fx.Node]:
    """The tensors that are returned; of a model with auxiliary outputs in train mode, those of both modes."""
    train, evaluation = (list(_tensors_of(get_output(g), costs)) for g in (captured.modes.train, captured.modes.eval))
    common = {node.name for node in evaluation}
    return [node for node in train if node.name in common] or train


def _tensors_of(output: fx.Node, costs: Profile) -> Iterator[fx.Node]:
    """The tensors that structures such as named tuples are made of."""
    for node in output.all_input_nodes:
        cost = costs.nodes.get(node)
        if cost is None or cost.shape is not None or node.op == "call_module":
            yield node
        else:
            yield from _tensors_of(node, costs)


def _behind(graph: fx.Graph, values: Iterable[fx.Node]) -> Mapping[fx.Node, int]:
    place = {node: index for index, node in enumerate(values, start=1)}
    behind: dict[fx.Node, int] = {}
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        behind[node] = max((place.get(s, behind[s]) for s in node.all_input_nodes), default=0)
        if node.op == "placeholder" or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    for node in reversed(graph.nodes):
        if node not in fed and node.users:
            behind[node] = min(behind[user] for user in node.users)
    return behind


def _state(captured: CollabGraphModule, behind: Mapping[fx.Node, int]) -> Mapping[str, int]:
    least: dict[int, int] = {}
    for node, place in behind.items():
        for tensor in state_tensors(node, captured).values():
            least[id(tensor)] = min(place, least.get(id(tensor), place))
    named: Iterable[tuple[str, Tensor]] = (*captured.named_parameters(), *captured.named_buffers())
    return {name: least.get(id(tensor), 0) for name, tensor in named}
