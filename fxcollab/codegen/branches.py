"""Code in which each branch is a function that is computed again in the backward pass.

The statements of each branch become a function of what the branch reads:

    def branch_b0_1(rescale_1):
        layer4_b0_1 = self.peers.b0_1.layer4(rescale_1);  rescale_1 = None
        return layer4_b0_1
    layer4_b0_1 = fxcollab_recompute(branch_b0_1, (self.peers.b0_1.layer4,), rescale_1)

The backward pass finishes one branch before it begins with the next.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, TypeAlias

from torch import fx, nn

from fxcollab._torch import codegen_of, format_target
from fxcollab.errors import PatternError
from fxcollab.fx_utils import Target, attribute, copy_graph, place
from fxcollab.provenance import provenance_of
from fxcollab.runtime.recompute import never_compile_pieces, recompute, recompute_module
from fxcollab.tree import Path, branch_name

Recompute: TypeAlias = Literal["heads"]


def check_recompute(recompute: str | None) -> None:
    """Raise a PatternError unless it is None or ``heads``."""
    if recompute not in (None, "heads"):
        raise PatternError(
            f"{recompute!r} is not a value of recompute.",
            hint="use recompute='heads' (--recompute heads), or leave it out",
        )


def branch_by_branch(graph: fx.Graph, root: nn.Module, peers: str) -> fx.Graph:
    """A copy of a training graph whose code runs each branch under `recompute`.

    Raises:
        PatternError: nodes of another branch stand between those of one.
        StateError: an added node reads values of several heads.
    """
    copied = _copy_with_recompute(graph)
    runs = list(_runs(copied, peers))
    return _generated(copied, lambda body: _in_functions(body, copied, runs, root))


def module_by_module(graph: fx.Graph, modules: Collection[str]) -> fx.Graph:
    """A copy of a training graph whose code runs calls of these modules under `recompute`."""
    copied = _copy_with_recompute(graph)
    calls = {
        position: f"{format_target('self', node.target)}("
        for position, node in enumerate(copied.nodes)
        if node.op == "call_module" and str(node.target) in modules
    }

    def with_calls(body: Sequence[str]) -> list[str]:
        statements = _by_node(body)
        for position, call in calls.items():
            statements[position] = statements[position].replace(call, f"fxcollab_recompute_module({call[:-1]}, ", 1)
        return statements

    return _generated(copied, with_calls)


def _copy_with_recompute(graph: fx.Graph) -> fx.Graph:
    never_compile_pieces()
    copied, codegen = copy_graph(graph), copy.copy(codegen_of(graph))
    own: Any = codegen
    own.additional_globals = lambda: [
        ("fxcollab_recompute", recompute),
        ("fxcollab_recompute_module", recompute_module),
    ]
    copied.set_codegen(codegen)
    return copied


def _generated(graph: fx.Graph, edit: Callable[[Sequence[str]], list[str]]) -> fx.Graph:
    """The graph, whose code is edited by ``edit`` after what was set before."""
    graph.on_generate_code(lambda before: lambda body: edit(before(body) if before else body))
    return graph


def _runs(graph: fx.Graph, peers: str) -> Iterator[tuple[Path, list[fx.Node]]]:
    """The branches that call anything, with their nodes.

    Raises:
        PatternError: nodes of another branch stand between those of one.
    """
    provenance = provenance_of(graph, peers)
    seen: dict[Path, fx.Node] = {}
    before: fx.Node | None = None
    for branch, run in groupby(list(graph.nodes), lambda node: provenance[node].branch):
        nodes = list(run)
        if branch in seen and before is not None:
            raise PatternError(
                f"Branches can't be computed again: {branch_name(branch)} can't run without interruption.",
                where=place(before),
                why=f"it has to run between {seen[branch].name!r} and {nodes[0].name!r} of the branch: it writes in "
                "place what that reads, calls the same module, which keeps state, or was added there by another pass",
                hint="leave recompute out, put the splits before or behind both, or compute a new value instead of "
                "writing into one",
            )
        if branch:
            seen[branch] = nodes[-1]
        before = next((node for node in reversed(nodes) if not provenance[node].inserted), before)
        if branch and any(node.op in ("call_module", "call_function", "call_method") for node in nodes):
            yield branch, nodes


def _stateful(nodes: Iterable[fx.Node], root: nn.Module) -> Iterator[str]:
    """The modules that nodes call or hand on, and tensors that they read, except parameters."""
    for node in nodes:
        if node.op in ("call_module", "get_attr"):
            value = attribute(root, str(node.target))
            target = Target(str(node.target), own=getattr(node.target, "own", False))
            owner, _, name = target.rpartition(".")
            if isinstance(value, nn.Module):
                yield format_target("self", target)
            elif not isinstance(value, nn.Parameter):
                yield f"({format_target('self', Target(owner, target.own))}, {name!r})"


def _in_functions(
    body: Sequence[str], graph: fx.Graph, runs: Iterable[tuple[Path, list[fx.Node]]], root: nn.Module
) -> list[str]:
    """The statements of a forward, those of each branch put into a function of what it reads of others."""
    statements = _by_node(body)
    positions = {node: position for position, node in enumerate(graph.nodes)}
    taken = {node.name for node in graph.nodes}
    for branch, nodes in runs:
        own, inside = slice(positions[nodes[0]], positions[nodes[-1]] + 1), set(nodes)
        name = f"branch_{branch_name(branch)}"
        while name in taken:
            name += "_"
        read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
        last_read = [source for source in read if all(positions[user] < own.stop for user in source.users)]
        outputs = [node.name for node in nodes if not inside.issuperset(node.users)]
        value = outputs[0] if len(outputs) == 1 else _tuple(outputs)
        inner = textwrap.indent(f"{''.join(statements[own])}return {value}\n", "    ")
        function = f"def {name}({', '.join(source.name for source in read)}):\n{inner}"
        stateful = _tuple([*dict.fromkeys(_stateful(nodes, root))])
        arguments = ", ".join([name, stateful, *(source.name for source in read)])
        freed = "".join(f";  {source.name} = None" for source in last_read)
        # Later statements keep their places.
        statements[own] = [f"{function}{value} = fxcollab_recompute({arguments}){freed}\n", *[""] * (len(nodes) - 1)]
    return statements


_MARK = re.compile(r"# COUNTER: (\d+)\n")  # what torch.fx puts before the statement of each node


def _by_node(body: Sequence[str]) -> list[str]:
    """What is generated for each node, with the mark before it."""
    whole = "".join(body)
    starts = [mark.start() for mark in _MARK.finditer(whole)]
    assert starts and not whole[: starts[0]].strip(), "torch.fx no longer marks the statements of nodes"
    return [whole[start:end] for start, end in zip(starts, [*starts[1:], len(whole)], strict=True)]


def _tuple(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
