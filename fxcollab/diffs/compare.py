"""One graph against another: two training models, a graph before and after a pass, any two graph modules.

Nodes are matched by provenance where there is any, else by name; what is left by what it does and by its neighbours,
to which are matched already.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from rich.console import RenderableType
from torch import Tensor, fx, nn

from fxcollab.codegen.module import CollabGraphModule
from fxcollab.diffs.compare_views import to_json, view
from fxcollab.diffs.comparison import ComparisonData, GraphNode, Row
from fxcollab.diffs.scene import TIMES, Scene, fraction
from fxcollab.diffs.scene_two import scene_of
from fxcollab.diffs.shown import Shown
from fxcollab.errors import DiffError, FxCollabError
from fxcollab.fx_utils import attribute, opened_module
from fxcollab.plan import PLAN_KEY, Plan
from fxcollab.provenance import Provenance, provenance_of
from fxcollab.tracing.capture import capture
from fxcollab.tree import branch_name

LEAST_IN_COMMON = 0.1
"""Of the smaller graph's nodes: with fewer in common two graphs are not drawn side by side."""


@dataclass(frozen=True)
class Comparison(Shown, ComparisonData):
    """Two graphs side by side; prints in a terminal, and shows itself in a notebook."""

    def scene(self) -> Scene:
        """What is drawn."""
        return scene_of(self)

    def to_json(self) -> str:
        """All of it as JSON, the same bytes for the same graphs."""
        return to_json(self)

    def __rich__(self) -> RenderableType:
        """The view for a terminal."""
        return view(self)


def compare(a: nn.Module, b: nn.Module, *, training: bool = True) -> Comparison:
    """Compare two graphs.

    Args:
        a: a training model, what `capture` or `prune` returned, any ``fx.GraphModule``, or a module to be captured.
        b: likewise.
        training: which graph to take where train and eval mode have one each.

    Raises:
        DiffError: they have hardly a node in common.
        CaptureError: a module can't be captured.
    """
    left, right = (_Graph(model, training) for model in (a, b))
    matches = _matched(left, right)
    pairs = [(left.nodes[name], right.nodes[other]) for name, other in matches.items()]
    same = len(pairs) == len(left.nodes) == len(right.nodes) and all(a.description == b.description for a, b in pairs)
    common = sum(a.description == b.description and a.op not in ("placeholder", "output") for a, b in pairs)
    smaller = min(len(left.nodes), len(right.nodes))
    if not same and common < max(1, LEAST_IN_COMMON * smaller):
        raise DiffError(
            "The two graphs have hardly a node in common.",
            where=f"{left.title}; {right.title}",
            why=f"{common} of {smaller} nodes do the same",
            hint="compare two models of one network: of other splits, before and after a pass, or of another depth",
        )
    return Comparison(left.title, right.title, tuple(_rows(left, right, matches)), (left.tree, right.tree))


def captured_like(model: nn.Module, plan: Plan) -> CollabGraphModule:
    """A model captured as the original of a plan was.

    Raises:
        DiffError: its forward takes other inputs, or it has no such splits.
    """
    inputs = inspect.signature(model.forward).parameters
    missing = [spec.name for spec in plan.interface.inputs if spec.name not in inputs]
    why = f"the forward of {type(model).__name__} takes no {missing[0]!r}" if missing else ""
    try:
        if not missing or isinstance(model, fx.GraphModule):
            return capture(model, plan.tree.splits, granularity=plan.granularity, interface=plan.interface)
    except FxCollabError as error:
        why = " ".join(filter(None, (error.what, error.why)))
    raise DiffError(
        "These are not two graphs of one network.",
        why=why,
        hint="give what prune returned, the model that was transformed, or another one with its inputs and splits",
    )


class _Graph:
    """A graph's nodes, and by what they are found in another."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        plan = model.meta.get(PLAN_KEY) if isinstance(model, CollabGraphModule) else None
        module = model if isinstance(model, fx.GraphModule) else capture(model)
        graph = module.modes.of(training) if isinstance(module, CollabGraphModule) else module.graph
        found = provenance_of(graph, plan.options.peers) if isinstance(plan, Plan) else {}
        self.keys: dict[str, tuple[Any, ...]] = {}
        self.nodes: dict[str, GraphNode] = {}
        self.called: dict[str, str] = {}
        self.opened = set[str]()
        for node in graph.nodes:
            from_ = found.get(node)
            path = from_.branch if from_ else ()
            while path and path[-1] == 0:  # the first of siblings goes on with the branch before the split
                path = path[:-1]
            inserted = from_.kind if from_ and from_.inserted else ""
            self.keys[node.name] = node.op, from_.origin if from_ else node.name, path, inserted
            if node.op == "call_module":
                own = f"{plan.options.peers}.{branch_name(from_.branch)}." if isinstance(plan, Plan) and from_ else ""
                self.called[node.name] = str(node.target).removeprefix(own)
            opened = opened_module(node, self.called.get(node.name))
            self.opened.add(opened)
            self.nodes[node.name] = _node(node, module, from_, opened)
        self._users = {node.name: tuple(user.name for user in node.users) for node in graph.nodes}
        self.tree = plan.tree if isinstance(plan, Plan) else None
        of = "graph"
        if isinstance(plan, Plan):
            at = f" at {', '.join(plan.tree.splits)}" if plan.tree.splits else ""
            of = f"training graph, {plan.tree.heads} heads, {plan.pattern}{at}"
        self.title = f"{type(model).__name__}: {of}, {len(self.nodes)} nodes"

    def neighbours(self, name: str, down: bool) -> tuple[str, ...]:
        """The nodes that one reads, from which the way goes down to it; or those that read it."""
        return self.nodes[name].inputs if down else self._users[name]

    def opens(self, path: str | None) -> bool:
        """Whether operations of a module that is one node elsewhere are nodes here."""
        return path is not None and any(f"{inner}.".startswith(f"{path}.") for inner in self.opened)


def _node(node: fx.Node, module: fx.GraphModule, from_: Provenance | None, opened: str) -> GraphNode:
    inserted, path = (from_.kind if from_.inserted else "", from_.branch) if from_ else ("", ())
    mark = f"grad {TIMES} {fraction(cast(float, node.args[1]))}" if inserted == "rescale" else inserted
    inputs = tuple(source.name for source in node.all_input_nodes)
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        label, described = type(called).__name__, _described(called)
    elif node.op in ("placeholder", "output", "get_attr"):
        label = described = {"placeholder": "input", "get_attr": "state"}.get(node.op, node.op)
    else:
        label = str(getattr(node.target, "__name__", node.target))
        described = _function(node.target)
    if node.op == "get_attr":
        value = attribute(module, str(node.target))
        described = f"state {tuple(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else described
    places = {source: f"_{place}" for place, source in enumerate(node.all_input_nodes, 1)}
    places = dict.fromkeys(places, "_") if len(places) == 1 else places
    options = fx.node.map_arg((node.args, node.kwargs), lambda value: cast(Any, _Value(places[value])))
    if node.op != "placeholder" and options != ((), {}):
        described = f"{described} {_text(options)}"
    return GraphNode(
        name=node.name,
        op=node.op,
        label=inserted or label,
        description=described,
        inputs=inputs,
        branch=branch_name(path) if path else "",
        path=path,
        origin=from_.origin if from_ and not inserted else node.name,
        module=opened,
        mark=mark if inputs else "",
    )


class _Value:
    """Stands for a value of another node, by its place among the inputs."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _function(target: Any) -> str:
    """The name of a function or method; those of one name are told apart by where they stand."""
    name = getattr(target, "__qualname__", str(target))
    code = getattr(target, "__code__", None)
    return f"{name} of {target.__module__}:{code.co_firstlineno}" if code is not None else name


def _text(options: Any) -> str:
    args, kwargs = options
    return f"({', '.join([*map(repr, args), *(f'{name}={value!r}' for name, value in kwargs.items())])})"


def _described(module: nn.Module) -> str:
    """Class and options of a module and of all inside."""
    inner = [f"{path}: {type(part).__name__}({part.extra_repr()})" for path, part in module.named_modules() if path]
    kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()})
    described = f"{type(module).__name__}({module.extra_repr()})" + (f" in {', '.join(kinds)}" if kinds else "")
    return described + (f" with {', '.join(inner)}" if inner else "")


def _matched(left: _Graph, right: _Graph) -> dict[str, str]:
    """The names of nodes of the first graph and of those of the second which they became.

    What has a name of its own is found by that first. Operations are numbered in their order, so that their
    neighbours say more than their names.
    """
    found = dict[str, str]()

    def named(a: GraphNode, b: GraphNode) -> bool:
        return a.op not in ("call_function", "call_method")

    for accepts in (named, lambda a, b: a.description == b.description, lambda a, b: True):
        by_key = {key: name for name, key in left.keys.items() if name not in found}
        matched = set(found.values())
        for name, key in right.keys.items():
            origin = None if name in matched else by_key.get(key)
            if origin is not None and accepts(left.nodes[origin], right.nodes[name]):
                found[origin] = name
        _match_neighbours(left, right, found)
    return found


def _match_neighbours(left: _Graph, right: _Graph, found: dict[str, str]) -> None:
    """Down from what is matched as far as it goes, since state is matched by name; then up from readers."""
    while _match_along(left, right, found, down=True) or _match_along(left, right, found, down=False):
        pass


def _match_along(left: _Graph, right: _Graph, found: dict[str, str], down: bool) -> bool:
    """Match what does the same and has neighbours that are matched to each other; False if there is none."""
    before, back = len(found), {other: name for name, other in found.items()}
    for name in right.nodes if down else reversed(right.nodes):
        around = right.neighbours(name, down)
        if name in back or not around or around[0] not in back:
            continue
        for candidate in left.neighbours(back[around[0]], not down):
            same = left.nodes[candidate].description == right.nodes[name].description
            places = tuple(found.get(other) for other in left.neighbours(candidate, down))
            if same and candidate not in found and places == around:
                found[candidate], back[name] = name, candidate
                break
    return len(found) > before


def _rows(left: _Graph, right: _Graph, matches: Mapping[str, str]) -> Iterator[Row]:
    """All nodes in the order of the second graph; what was removed stands behind what it stood behind."""
    back = {name: other for other, name in matches.items()}
    removed: dict[str | None, list[str]] = {}
    previous: str | None = None
    for name in left.nodes:
        if name in matches:
            previous = name
        else:
            removed.setdefault(previous, []).append(name)
    yield from _removed(left, right, removed.get(None, ()))
    for name, node in right.nodes.items():
        origin = back.get(name)
        if origin is None:
            yield Row(None, node, "added", _opened("A", left, right, name))
            continue
        yield _pair(left.nodes[origin], node, matches)
        yield from _removed(left, right, removed.get(origin, ()))


def _removed(left: _Graph, right: _Graph, names: Iterable[str]) -> Iterator[Row]:
    return (Row(left.nodes[name], None, "removed", _opened("B", right, left, name)) for name in names)


def _opened(side: str, graph: _Graph, other: _Graph, name: str) -> str:
    """Of a module that is a node of the other graph alone: whether it was opened here."""
    return f"{other.nodes[name].label}, opened in {side}" if graph.opens(other.called.get(name)) else ""


def _pair(a: GraphNode, b: GraphNode, matches: Mapping[str, str]) -> Row:
    if a.description != b.description:
        return Row(a, b, "changed", _change(a.description, b.description))
    if tuple(matches.get(name) for name in a.inputs) != b.inputs:
        return Row(a, b, "rewired", f"reads {', '.join(a.inputs)} -> {', '.join(b.inputs)}")
    return Row(a, b, "same")


def _change(before: str, after: str) -> str:
    """Only the options that differ, where it is the same kind of thing."""
    kind = before.partition("(")[0]
    gone, new = (Counter(_OPTIONS.findall(text)) for text in (before, after))
    if kind != after.partition("(")[0] or not any("=" in option for option in (*(gone - new), *(new - gone))):
        return f"{before} -> {after}"
    return f"{kind}: {', '.join(gone - new) or 'nothing'} -> {', '.join(new - gone) or 'nothing'}"


_OPTIONS = re.compile(r"[\w.]+(?:=(?:\([^()]*\)|[^,() ]+))?")
