"""Other orders than a graph's own: where one would change what a module with state does."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import FunctionType

from torch import fx, nn

from fxcollab.module_state.classes import by_class, classes_of
from fxcollab.runtime.functional_call import FunctionalCall


def swapped_calls(graph: fx.Graph, ordered: Sequence[fx.Node], root: nn.Module) -> tuple[fx.Node, fx.Node] | None:
    """Two calls of one module that change its state, and that ``ordered`` has the other way round.

    Args:
        graph: the graph, whose order is the right one.
        ordered: its nodes in another order of the data flow.
        root: the module that targets refer to.
    """
    position = {node: i for i, node in enumerate(ordered)}
    for calls in calls_by_state(graph.nodes, root):
        for one, other in pairwise(calls):
            if position[one] > position[other]:
                return one, other
    return None


def calls_by_state(nodes: Iterable[fx.Node], root: nn.Module) -> list[list[fx.Node]]:
    """For each module that keeps state from call to call, the nodes that run it, in their order."""
    found: dict[nn.Module, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "call_module":
            for part in parts_of(root.get_submodule(str(node.target))):
                if keeps_state(part):
                    found.setdefault(part, []).append(node)
    return list(found.values())


def parts_of(module: nn.Module) -> Iterable[nn.Module]:
    """A module and those in it, also where it is called with some of its parameters handed in."""
    return (module.module if isinstance(module, FunctionalCall) else module).modules()


def may_change(part: nn.Module) -> bool:
    """Whether a call may leave it as another: what is seen to keep state may, and what is no layer of torch's own."""
    return keeps_state(part) or not type(part).__module__.startswith("torch.nn.")


def keeps_state(part: nn.Module) -> bool:
    """Whether it is seen to keep state beside parameters.

    That are buffers, hooks, weights that a forward writes, a forward of the instance's own, and classes of the user's
    whose code sets attributes or calls what changes containers.
    """
    return bool(
        part._buffers
        or part._forward_hooks
        or part._forward_pre_hooks
        or getattr(part, "max_norm", None) is not None
        or "forward" in part.__dict__
        or any(map(_changes_itself, classes_of(type(part))))
    )


_CHANGES = frozenset(
    ("append", "extend", "insert", "pop", "popleft", "appendleft", "add", "update", "setdefault", "clear")
)


@by_class
def _changes_itself(cls: type) -> bool:
    """Whether methods of a class beside its constructor set attributes or items, or call what changes a container."""
    functions = (value for name, value in vars(cls).items() if name != "__init__" and isinstance(value, FunctionType))
    return any(
        one.opname in ("STORE_ATTR", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR")
        or (one.opname in ("LOAD_METHOD", "LOAD_ATTR") and one.argval in _CHANGES)
        for function in functions
        for one in dis.get_instructions(function)
    )
