"""Where a model can be cut: at a value through which every gradient passes, or where none does, at a few values.

Behind a cut lies what depends on its values. Where all outputs do, it is a split; values of the trunk that are read
behind it beside its own, such as skip connections, cross with it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from torch import fx

from fxcollab.analysis.levels import state_tensors
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.profile import Profile
from fxcollab.fx_utils import ancestors, get_output

K = TypeVar("K", fx.Node, str)
N = TypeVar("N", int, float)
GAP = 1 / 8
"""Between cuts at one value with more of the work between them, cuts at several values are looked for."""
PARTS = 24
"""Of so many parts of the work, each has at most one cut at several values: the narrowest."""
_SEARCHED = 64


@dataclass(frozen=True, eq=False)
class Cut:
    """A point at which the model can be cut.

    Attributes:
        values: the nodes at which it is cut, none of which depends on another.
        behind: the nodes, and the names of parameters and buffers, that lie behind; what doesn't depend on an input
            lies where it is first used.
        crossing: the nodes of values with gradients that are read behind it.
    """

    values: tuple[fx.Node, ...]
    behind: Container[fx.Node | str]
    crossing: tuple[fx.Node, ...]

    @property
    def is_narrow(self) -> bool:
        """Whether one value crosses."""
        return len(self.crossing) == 1


@dataclass(frozen=True, eq=False)
class Cuts:
    """The cuts of a captured model in train mode, ordered by the work before them.

    Attributes:
        captured: the captured model.
        costs: the profile of its train mode's graph.
        cuts: the cuts; each at one value lies behind those before it.
    """

    captured: CollabGraphModule
    costs: Profile
    cuts: tuple[Cut, ...]
    _places: Mapping[fx.Node | str, int]

    def before(self, numbers: Mapping[K, N]) -> list[N]:
        """The sums of what lies before each cut, and last that of everything."""
        count = sum(isinstance(cut.behind, _BehindPlace) for cut in self.cuts)
        sums: list[Any] = [0] * (count + 1)
        for key, number in numbers.items():
            sums[self._places[key]] += number
        sums = list(accumulate(sums))

        def of(cut: Cut) -> Any:
            if isinstance(cut.behind, _BehindPlace):
                return sums[cut.behind.place]
            return sum(number for key, number in numbers.items() if key not in cut.behind)

        return [*map(of, self.cuts), sums[-1]]


@dataclass(frozen=True, eq=False)
class _BehindPlace:
    """What lies behind a place in the chain of values through which every gradient passes."""

    places: Mapping[Any, int]
    place: int

    def __contains__(self, key: object) -> bool:
        return self.places[key] > self.place


def cuts_of(captured: CollabGraphModule, costs: Profile, named: Mapping[fx.Node, tuple[str, bool]]) -> Cuts:
    """The cuts of a captured model; those at several values only at nodes that are ``named``.

    Nodes have their names as splits, and whether these are modules'.
    """
    graph = captured.modes.train
    flow = _Flow(captured, costs)
    chain = flow.dominators()
    place = {node: index for index, node in enumerate(chain, start=1)}
    nodes = flow.settled(lambda node, sources: max((place.get(s, sources[s]) for s in sources), default=0), min)
    places = flow.with_state(nodes, min)
    narrow = Cuts(
        captured, costs, tuple(Cut((node,), _BehindPlace(places, i), (node,)) for i, node in enumerate(chain)), places
    )
    work = {node: costs.nodes[node].forward_flops for node in graph.nodes}
    before = narrow.before(work)
    total = before[-1] or 1
    edges = [0, *(b for node, b in zip(chain, before, strict=False) if node in named), total]
    gaps = [(low / total, high / total) for low, high in pairwise(edges) if high - low > GAP * total]
    wide = _narrowest(flow.wide_cuts(gaps, named, set(chain)), work, gaps, named)
    ordered = sorted([*zip(before, narrow.cuts, strict=False), *wide], key=lambda entry: entry[0])
    return Cuts(captured, costs, tuple(cut for _, cut in ordered), places)


def _narrowest(
    found: Iterable[Cut],
    work: Mapping[fx.Node, int],
    gaps: Sequence[tuple[float, float]],
    named: Mapping[fx.Node, tuple[str, bool]],
) -> list[tuple[int, Cut]]:
    """Of the cuts in each part of the work that lies in a gap, the narrowest, with the work before it.

    Of equals it is the first at the ends of modules, the outermost ones.
    """
    total = sum(work.values()) or 1

    def rank(cut: Cut) -> tuple[int, bool, int]:
        names = [named[node] for node in cut.values]
        is_module = all(of_module for _, of_module in names)
        return len(cut.crossing), not is_module, sum(name.count(".") for name, _ in names)

    best: dict[int, tuple[int, Cut]] = {}
    for cut in found:
        before = sum(flops for node, flops in work.items() if node not in cut.behind)
        part = int(PARTS * before / total)
        inside = any(low < before / total < high for low, high in gaps)
        if inside and (part not in best or rank(cut) < rank(best[part][1])):
            best[part] = before, cut
    return list(best.values())


class _Flow:
    """The flow of gradients through the graph of train mode."""

    def __init__(self, captured: CollabGraphModule, costs: Profile) -> None:
        self._captured, self._costs, self._graph = captured, costs, captured.modes.train
        self._of_inputs: set[fx.Node] = set()
        for node in self._graph.nodes:
            if node.op == "placeholder" or not self._of_inputs.isdisjoint(node.all_input_nodes):
                self._of_inputs.add(node)
        # What is computed from parameters alone is computed where it is used.
        self._carriers = carriers(captured, costs) & self._of_inputs
        self._ends = [node for node in _outputs(captured, costs) if node in self._carriers]
        self._readers = {node: set(state_tensors(node, captured).values()) for node in self._graph.nodes}

    def dominators(self) -> tuple[fx.Node, ...]:
        """The nodes on every path of gradients from the outputs."""
        import networkx as nx  # takes long to import, and nothing else needs it

        start, end = "start", "end"
        if not self._ends:
            return ()
        flow = nx.DiGraph((node, end) for node in self._ends)
        for node in self._carriers:
            sources: set[Any] = self._carriers.intersection(node.all_input_nodes)
            flow.add_edges_from((source, node) for source in sources or {start})
        dominators = nx.immediate_dominators(flow, start)
        chain: list[Any] = []
        value = dominators[end]
        while value is not start:
            chain.append(value)
            value = dominators[value]
        return tuple(value for value in reversed(chain) if self._can_be_cut(value))

    def settled(
        self, place: Callable[[fx.Node, Mapping[fx.Node, Any]], Any], first: Callable[[Iterable[Any]], Any]
    ) -> dict[fx.Node, Any]:
        """The place of every node, from those of its inputs; of one that depends on none the first of its users'."""
        places: dict[fx.Node, Any] = {}
        for node in self._graph.nodes:
            places[node] = place(node, {source: places[source] for source in node.all_input_nodes})
        for node in reversed(self._graph.nodes):
            if node not in self._of_inputs and node.users:
                places[node] = first(places[user] for user in node.users)
        return places

    def with_state(self, nodes: Mapping[fx.Node, N], first: Callable[[Iterable[N]], N]) -> dict[Any, Any]:
        """The places of nodes, and of the names of parameters and buffers: where they are first used."""
        uses: dict[int, list[N]] = {}
        for node, tensors in self._readers.items():
            for tensor in tensors:
                uses.setdefault(id(tensor), []).append(nodes[node])
        named = (*self._captured.named_parameters(), *self._captured.named_buffers())
        start = first([nodes[node] for node in self._graph.nodes])
        return {**nodes, **{name: first(uses.get(id(tensor), [start])) for name, tensor in named}}

    def wide_cuts(
        self, gaps: Sequence[tuple[float, float]], named: Container[fx.Node], chain: set[fx.Node]
    ) -> Iterator[Cut]:
        """Cuts at other values than those of the chain, on which all outputs depend."""
        if not gaps or not self._ends:
            return
        candidates = [node for node in self._carriers if node in named and self._can_be_cut(node)]
        candidates.sort()
        reached = self._before_all_ends()
        singles = [(node,) for node in _spread(candidates) if node in reached and node not in chain]
        for values in dict.fromkeys([*singles, *self._fronts(set(candidates))]):
            cut = self._cut(values)
            if all(end in cut.behind for end in self._ends):
                yield cut

    def _cut(self, values: tuple[fx.Node, ...]) -> Cut:
        inside = self.settled(lambda node, sources: any(s in values or sources[s] for s in sources), all)
        behind = {key for key, is_behind in self.with_state(inside, all).items() if is_behind}
        before = (node for node in self._carriers if node not in behind)
        return Cut(values, behind, tuple(sorted(node for node in before if not behind.isdisjoint(node.users))))

    def _fronts(self, candidates: set[fx.Node]) -> Iterator[tuple[fx.Node, ...]]:
        """For even parts of the longest path of work, the last values on it and beside it."""
        depth: dict[fx.Node, int] = {}
        for node in self._graph.nodes:
            own = self._costs.nodes[node].forward_flops if node in self._costs.nodes else 0
            depth[node] = own + max((depth[source] for source in node.all_input_nodes), default=0)
        longest = max((depth[end] for end in self._ends), default=0)
        for part in range(1, PARTS):
            limit = longest * part / PARTS
            live = [n for n in self._carriers if depth[n] <= limit and any(depth[u] > limit for u in n.users)]
            hidden: set[fx.Node] = set()  # what others of them depend on
            last = []
            for node in sorted(live, reverse=True):
                if node not in hidden:
                    last.append(node)
                    hidden |= ancestors(node)
            if last and candidates.issuperset(last):
                yield tuple(reversed(last))

    def _before_all_ends(self) -> set[fx.Node]:
        return set.intersection(*map(ancestors, self._ends))

    def _can_be_cut(self, node: fx.Node) -> bool:
        """Whether it is a tensor, or what a module returns."""
        return self._costs.nodes[node].shape is not None or node.op == "call_module"


def _spread(nodes: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """At most so many of the nodes, evenly spread."""
    step = max(1, -(-len(nodes) // _SEARCHED))
    return nodes[::step]


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
