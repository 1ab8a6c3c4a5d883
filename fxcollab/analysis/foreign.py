"""State that nodes reach without being handed it.

A module that is kept whole is one node, and only the state that it registers is known. If it reads other tensors of
the model (a parameter in a tuple, a module in a global), its gradient may not be rescaled, and a peer may compute
with that of head 0. It depends on levels and on how peers are copied whether that is correct:

- A copy of a module has copies of what it holds. State of the module's own level becomes the branch's own, wherever
  it is registered.
- Globals, weak references and opened modules are not copied: what is reached through them stays head 0's.
- A parameter of a shallower level would be shared unrescaled, and so would a module's own where it is called on both
  sides of a split. Of a deeper level there are several, of which the module would reach one.
- A buffer of the trunk exists once, and all branches read the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, fx, nn

from fxcollab.analysis.effects import Observation
from fxcollab.analysis.levels import module_of
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.deep_copy import parts_of_value
from fxcollab.errors import CaptureError, SplitError
from fxcollab.functional import parameter_names, tensors_of
from fxcollab.fx_utils import attribute, place
from fxcollab.tracing.tracer import SHARES_LISTS

Levels = Mapping[fx.Node, int]


def refuse_foreign_state(
    root: nn.Module, nodes: Iterable[Levels], state: Mapping[str, int], observation: Observation
) -> None:
    """Raise for nodes that reach state of the model which their branches would not have, or not rescale.

    ``nodes`` are the levels of every graph's nodes, ``state`` those of parameters and buffers by name.

    Raises:
        SplitError: with what reaches what, and the way out.
    """
    levels = [(node, level) for graph in nodes for node, level in graph.items()]
    first, deepest = dict[object, int](), dict[object, int]()
    for node, level in levels:
        first[_called(node)] = min(level, first.get(_called(node), level))
        deepest[_called(node)] = max(level, deepest.get(_called(node), level))
    tensors = tensors_of(root)
    for node, level in levels:
        for source in observation.of(node).writes if level else ():
            if source.op == "get_attr" and not isinstance(attribute(root, str(source.target)), Tensor | nn.Module):
                raise SplitError(
                    f"{_reader(node)!r} changes {str(source.target)!r}, an object that the heads behind it share.",
                    where=place(node),
                    why="every head would change it at every call, where the model does once",
                    hint="put the splits behind it, or make the object in the forward",
                )
        for name in sorted(observation.of(node).changes):
            if state[name] < level and _is_trained(tensors[name]):
                raise SplitError(
                    f"{_reader(node)!r} writes into {name!r}, which the heads behind it share.",
                    where=place(node),
                    why=f"every head would write into {name!r} at every call, where the model writes once",
                    hint="put the splits behind the write, or before the first use of what it writes into; or write "
                    "outside of the forward, once a step",
                )
    for node, _ in levels:
        for name, copied in sorted(observation.of(node).reads):
            low, high = first[_called(node)], deepest[_called(node)]
            has_gradient = _is_trained(tensors[name])
            reaches_its_own = state[name] <= low and (copied or state[name] == 0)
            if not reaches_its_own or (has_gradient and state[name] != high):
                raise _refusal(node, name, state[name], low, high)


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or tensor.requires_grad


def _reader(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _called(node: fx.Node) -> object:
    return str(node.target) if node.op == "call_module" else node


def _refusal(node: fx.Node, name: str, level: int, first: int, deepest: int) -> SplitError:
    if level > first:
        why = f"each branch behind has a {name!r} of its own, of which it would reach head 0's"
    elif 0 < level == deepest:
        why = f"globals, weak references and opened modules aren't copied: every head would use head 0's {name!r}"
    else:
        why = f"the branches would share {name!r}, and its gradient could not be rescaled to their mean"
    reader = _reader(node)
    how = "elsewhere than where it is registered" if name.startswith(f"{reader}.") else "without registering it"
    return SplitError(
        f"{reader!r} reads {name!r} {how}.",
        where=place(node),
        why=why,
        hint="register what a module uses on it, as in self.w = w (ties are kept), and read it there; "
        "or put the splits behind both",
    )


def refuse_modules_on_both_sides(root: nn.Module, nodes: Iterable[Levels], state: Mapping[str, int]) -> None:
    """Raise for a module that is handed to calls of several levels: its gradients could not be rescaled.

    Raises:
        SplitError: with the module and the call.
    """
    for levels in nodes:
        for node, level in levels.items():
            module = module_of(node, root) if node.op == "get_attr" else None
            if module is None:
                continue
            own = (state[f"{node.target}.{name}"] for name in parameter_names(module))
            deeper = next((user for user in node.users if levels[user] != level), None)
            if any(deeper is not None or found != level for found in own):
                raise SplitError(
                    f"Module {str(node.target)!r} is handed to calls before and behind a split.",
                    where=place(deeper or node),
                    why="the branches would share its parameters, and their gradient could not be rescaled",
                    hint="put the splits behind all of these calls, or before them; or register the module in each "
                    "module that calls it",
                )


def refuse_state_written_by_modes(state: Mapping[str, int], observation: Observation) -> None:
    """Raise for state behind a split that ``train()`` of an opened module writes: it would write head 0's only.

    Raises:
        SplitError: with the state.
    """
    written = [name for name in sorted(observation.written_by_modes) if state.get(name)]
    if written:
        raise SplitError(
            "train() of a module that is opened writes state behind a split.",
            where=", ".join(written[:4]),
            why="of the heads, only head 0 would change with the mode",
            hint="do it in the train() of a module that lies behind the split as a whole, of which every head has a "
            "copy, or put the splits behind it",
        )


def refuse_objects_with_state(captured: CollabGraphModule) -> None:
    """Raise for objects that are handed to modules and hold tensors of the model: all heads would use the same.

    Raises:
        CaptureError: with the object.
    """
    names = {id(tensor): name for name, tensor in tensors_of(captured).items()}
    for node in (node for graph in captured.modes for node in graph.find_nodes(op="get_attr")):
        value = attribute(captured, str(node.target))
        if isinstance(value, Tensor | nn.Module):
            continue
        held = next((names[id(part)] for part in parts_of_value(value) if id(part) in names), None)
        if held is not None:
            raise CaptureError(
                f"{str(node.target)!r}, which the forward hands on, holds {held!r}.",
                where=place(node),
                why="of the heads, each has another, and would use that of head 0",
                hint="hand the tensor on by itself, or let the module that needs it register it",
            )


def refuse_written_literals(observation: Observation) -> None:
    """Raise for calls that change a list or dict of the forward: the graph makes it anew for every call.

    Raises:
        CaptureError: with the call.
    """
    for node, effects in observation.effects.items():
        if effects.literals and node.meta.get(SHARES_LISTS):
            raise CaptureError(
                f"{_reader(node)!r} changes a list or dict that the forward hands to other calls, too.",
                where=place(node),
                why="the graph makes that list anew for every call, so that others would not see the change",
                hint="keep all calls that share the list in one module, with the splits outside of it; or put the "
                "list into an object of a class of its own, which is made in the forward",
            )


def refuse_frozen_attributes(captured: CollabGraphModule, observation: Observation) -> None:
    """Raise for tensors that the graph reads from attributes which a call of the model changes, as hooks do.

    Raises:
        CaptureError: with the attribute.
    """
    registered = tensors_of(captured)
    for graph in captured.modes:
        for node in graph.find_nodes(op="get_attr"):
            if node.target in registered:
                continue
            tensor = attribute(captured, str(node.target))
            for name in sorted(observation.changed):
                owner, _, leaf = name.rpartition(".")
                value = vars(captured.root.get_submodule(owner)).get(leaf)
                if any(part is tensor for part in parts_of_value(value)):
                    raise CaptureError(
                        f"The graph would read what an earlier call left in {name!r}.",
                        where=place(node),
                        why=f"a module or a hook that is kept whole changes {name!r} at every call, where the graph "
                        "can't see it",
                        hint="return the value from the module that computes it, or keep the code that reads it in "
                        "the same module, with the splits outside of it",
                    )
