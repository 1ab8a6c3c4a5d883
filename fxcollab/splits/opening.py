"""Which modules to open in search of splits, and the names of the values that are found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxcollab._torch import DATA_DEPENDENT_ERRORS
from fxcollab.analysis.split_names import inner_names
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import ForwardError
from fxcollab.tracing.capture import Granularity, capture
from fxcollab.tracing.examples import forward_flops, real_values
from fxcollab.tracing.interface import ExampleInputs, Interface
from fxcollab.tracing.tracer import RETURNED_BY, call_name

LARGE = 1 / 8
"""Modules that do more than this share of all work are opened."""


@dataclass(frozen=True, eq=False)
class Searched:
    """A model in search of splits, and how it is captured; all shapes of ``interface`` are known."""

    model: nn.Module
    interface: Interface
    example_inputs: ExampleInputs | None
    granularity: Granularity

    @property
    def is_open(self) -> bool:
        """Whether every capture gives the same graph, whatever the splits."""
        return self.granularity == "op" or isinstance(self.model, fx.GraphModule)

    def capture(self, splits: Sequence[str] = ()) -> CollabGraphModule:
        """The model, opened as splits need it."""
        return capture(self.model, splits, self.example_inputs, self.granularity, interface=self.interface)


def opened(searched: Searched, depth: int | None) -> CollabGraphModule:
    """The model, captured with those modules opened between whose parts a good split may lie; see `find_splits`."""
    if searched.is_open:
        return searched.capture()
    inside = dict(_to_open(searched, depth))
    with suppress(ForwardError):
        return searched.capture(list(inside.values()))
    found, taken = searched.capture(), dict[str, str]()
    for path, name in inside.items():  # outer modules come first
        around = [outer for outer in inside if path.startswith(f"{outer}.")]
        if not around or around[-1] in taken:
            with suppress(ForwardError):
                found = searched.capture([*taken.values(), name])
                taken[path] = name
    return found


def _to_open(searched: Searched, depth: int | None) -> Iterator[tuple[str, str]]:
    """Paths of modules, each with the name of a split inside that makes `capture` open it."""
    flops: Mapping[str, int] = {} if depth is not None else _forward_flops(searched)
    for path, module in searched.model.named_modules():
        is_chosen = path.count(".") < depth if depth is not None else flops.get(path, 0) > LARGE * flops[""]
        if path and is_chosen and _can_be_opened(module):
            yield path, f"{path}.{next(name for name, _ in module.named_children())}"


def _forward_flops(searched: Searched) -> Mapping[str, int]:
    try:
        return forward_flops(searched.model, searched.interface)
    except DATA_DEPENDENT_ERRORS:
        values = real_values(searched.model, searched.interface, searched.example_inputs)
        if values is None:
            raise
    return forward_flops(searched.model, searched.interface, values)


def _can_be_opened(module: nn.Module) -> bool:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    of_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, containers)
    whole = isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_checkpoint_wrapped_module")
    return any(True for _ in module.children()) and not of_torch and not whole


def value_names(captured: CollabGraphModule, searched: Searched) -> Mapping[fx.Node, tuple[str, bool]]:
    """The name under which `transform` finds each value of ``captured``, and whether it is a module's.

    A module's value has the outermost module's name. Other nodes have the name that they have in the graph that
    `capture` makes for the split: that of the node, if every capture gives the same graph; else those in the root's
    own forward the node's name there, and those in other modules that of `inner_names`. A name that is also a
    module's path means the module. Values that only one mode computes have no name.
    """
    graph = captured.modes.train
    paths = {path for path, _ in searched.model.named_modules()}
    own = {node: node.name for node in graph.nodes} if searched.is_open else own_names(graph)
    named = own if searched.is_open else {**dict(inner_names(graph)), **own}
    names = {node: (name, False) for node, name in named.items() if name not in paths}
    names |= {node: (name, True) for node, name in returned_by(graph).items()}
    if not captured.modes.differ:
        return names
    common = {node.name for node in captured.modes.eval.nodes} | set(returned_by(captured.modes.eval).values())
    common |= {name for _, name in inner_names(captured.modes.eval)}
    return {node: name for node, name in names.items() if name[0] in common}


def own_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """The names that what the root's own forward computes, other than by calling modules, has if none is opened."""
    unopened, opened, names = fx.Graph(), set[str](), dict[fx.Node, str]()
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if not stack:
            name = unopened.create_node(node.op, node.target).name
            if node.op in ("call_function", "call_method"):
                names[node] = name
        elif (call := next(iter(stack))) not in opened:
            opened.add(call)
            unopened.create_node("call_module", stack[call][0])
    return names


def returned_by(graph: fx.Graph) -> dict[fx.Node, str]:
    """The outermost module that returns each value; ``name@2`` is its second call."""
    calls: dict[str, int] = {}
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        returned = [str(call) for call in node.meta.get(RETURNED_BY, ())]
        if node.op == "call_module":
            path = str(node.target)
            calls[path] = calls.get(path, 0) + 1
            returned.append(call_name(path, calls[path]))
        if returned:
            names[node] = min(returned, key=lambda name: (name.count("."), len(name)))
    return names
