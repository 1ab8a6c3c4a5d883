"""Split names become nodes: module paths, calls (``name@2``), node names, values in a module, and ``a+b``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from torch import fx, nn

from fxcollab.errors import SplitError, closest
from fxcollab.runtime.operators import stop_gradient
from fxcollab.tracing.tracer import RETURNED_BY, call_name


def find_cut(split: str, graph: fx.Graph, root: nn.Module) -> tuple[fx.Node, ...]:
    """The nodes whose values ``split`` cuts at; ``root`` is the module that the graph's targets refer to.

    A module's name means the value it returns, ``name@2`` that of its second call; a list or dict of modules, which
    has no forward, the last of them that is called; ``path.add_1`` the second ``add`` in the forward of the module at
    ``path`` itself, see `inner_names`; any other name is that of a node.
    Several names are joined by ``+``.

    Raises:
        SplitError: there is no such value, or several have the name.
    """
    parts = [part.strip() for part in split.split("+")]
    cut = tuple(_without_gradient(_find_value(part, graph, root)) for part in parts)
    if len(set(cut)) < len(cut):
        raise SplitError(f"Split {split!r} names the same value twice.", hint="name every value once")
    return cut


def _find_value(name: str, graph: fx.Graph, root: nn.Module) -> fx.Node:
    path, _, call = name.partition("@")
    if call and not re.fullmatch("[1-9][0-9]{0,8}", call):
        raise SplitError(f"{name!r} names no call.", hint=f"{path}@2 is the second call of {path}")
    returned = _returned_values(path, graph, root)
    if returned:
        number = int(call or 1)
        if number > len(returned):
            times = "once" if len(returned) == 1 else f"{len(returned)} times"
            hint = f"the last one is {path if len(returned) == 1 else f'{path}@{len(returned)}'}"
            raise SplitError(f"There is no call {name!r}.", why=f"{path} is called {times}", hint=hint)
        return returned[number - 1]
    named: dict[str, fx.Node] = {node.name: node for node in graph.nodes if node.op != "output"}
    inner = (node for node, inner_name in inner_names(graph) if inner_name == name)
    found = named.get(name) or next(inner, None)
    if found is not None:
        return found
    raise _unknown(name, path, graph, root)


def owners(split: str, graph: fx.Graph, root: nn.Module) -> tuple[str | None, ...]:
    """For every value of a split, the module in whose forward it is computed; None for what a module returns."""
    parts = [part.strip() for part in split.split("+")]
    by_module = [bool(_returned_values(part.partition("@")[0], graph, root)) for part in parts]
    found = zip(parts, by_module, strict=True)
    return tuple(None if module else _owner(_find_value(part, graph, root)) for part, module in found)


def _owner(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def inner_names(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """What modules that were traced into compute themselves, other than by calling modules, with a name for each.

    The name is the module's path and the name that the node would have in a graph of this module alone, so that it
    doesn't depend on which other modules are opened.
    """
    counts = Counter[str]()
    for node in graph.nodes:
        path = _owner(node)
        if path and node.op in ("call_function", "call_method"):
            name = f"{path}.{_NUMBER.sub('', node.name)}"
            yield node, f"{name}_{counts[name]}" if counts[name] else name
            counts[name] += 1


_NUMBER = re.compile(r"_\d+$")


def _without_gradient(node: fx.Node) -> fx.Node:
    """For a value computed under ``no_grad``, the node behind it that stops the gradient."""
    stopped = (user for user in node.users if user.target is stop_gradient and len(user.args) > 1)
    return next((user for user in stopped if user.args[0] is node), node)


def _returned_values(path: str, graph: fx.Graph, root: nn.Module) -> list[fx.Node]:
    """What the calls of the module at ``path`` return, in the order of the calls."""
    modules = dict(root.named_modules(remove_duplicate=False))
    module = modules.get(path)
    if not path:
        return []
    if module is None:  # export drops modules without state, but keeps them in the stack of their nodes
        return _returned_by_stack(path, {path}, graph)
    aliases = {alias for alias, other in modules.items() if other is module}
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in aliases]
    found = calls or _returned_by_opened(aliases, graph) or _returned_by_stack(path, aliases, graph)
    if found or type(module).forward is not nn.Module.forward:
        return found
    inside = {value for name in module._modules for value in _returned_values(f"{path}.{name}", graph, root)}
    return [node for node in graph.nodes if node in inside][-1:]


def _returned_by_opened(aliases: set[str], graph: fx.Graph) -> list[fx.Node]:
    """The values that the tracer noted when it opened the module."""
    found = {}
    for node in graph.nodes:
        for call in node.meta.get(RETURNED_BY, ()):
            path, _, number = call.partition("@")
            if path in aliases:
                found[int(number or 1)] = node
    return [found[number] for number in sorted(found)]


def _returned_by_stack(path: str, aliases: set[str], graph: fx.Graph) -> list[fx.Node]:
    """In a graph from another tracer: the values of nodes inside the module that nodes outside of it read."""
    inside: dict[str, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        for key, (module_path, *_) in (node.meta.get("nn_module_stack") or {}).items():
            if module_path in aliases:
                inside.setdefault(str(key), {})[node] = None
    values = []
    for nodes in inside.values():
        leaving = [node for node in nodes if node.op != "get_attr" and any(user not in nodes for user in node.users)]
        if len(leaving) > 1:
            raise SplitError(
                f"Module {path!r} returns {len(leaving)} values.",
                where=", ".join(node.name for node in leaving),
                why="a split at a module means the one value that it returns",
                hint=f"cut at several values at once: {'+'.join(node.name for node in leaving)}",
            )
        values += leaving
    return values


def _unknown(name: str, path: str, graph: fx.Graph, root: nn.Module) -> SplitError:
    modules = dict(root.named_modules(remove_duplicate=False))
    nodes = [node.name for node in graph.nodes if node.op not in ("output", "placeholder")]
    if path in modules:
        why, hint = _way_out(path, graph, nodes)
        return SplitError(f"Module {path!r} returns no value of the captured graph.", why=why, hint=hint)
    near = closest(name, [*(p for p in modules if p), *nodes, *(inner for _, inner in inner_names(graph))])
    return SplitError(
        f"There is no module and no node named {name!r}.",
        where=f"{type(root).__qualname__}",
        hint=(f"did you mean {near}? " if near else f"there are {', '.join(nodes[:12])}; ")
        + "find_splits(model) (fxcollab splits) lists all with what they cost",
    )


def _way_out(path: str, graph: fx.Graph, nodes: list[str]) -> tuple[str, str]:
    """Why the graph can't be split at the module at ``path``, and where it can."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    around = sorted(target for target in targets if path.startswith(f"{target}."))
    if around:
        hint = f"split at {around[0]!r}, or capture with granularity='op' (--granularity op)"
        return f"{around[0]!r} is kept whole and contains it", hint
    inside = [target for target in targets if target.startswith(f"{path}.")]
    if inside:
        last = call_name(inside[-1], inside.count(inside[-1]))
        return (
            "the forward calls the modules in it, but not the module itself",
            f"split at the last of them: {last!r}",
        )
    called = list(dict.fromkeys(targets))
    if called:
        return "the forward never calls it", "split at a module that the forward calls: " + ", ".join(called[:8])
    values = [node.name for node in graph.nodes if node.op.startswith("call") and node.users and node.name in nodes]
    return "the forward calls no module", "split at a value: " + ", ".join(values[-8:])
