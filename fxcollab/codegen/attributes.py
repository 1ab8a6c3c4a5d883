"""What a graph module takes over from its root: attributes, extra state, what optimizers of libraries ask for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fxcollab._torch import LOAD_OWN_STATE, SAVE_OWN_STATE
from fxcollab.codegen.checkpointing import on_all_branches
from fxcollab.codegen.modes import Modes
from fxcollab.errors import StateError
from fxcollab.fx_utils import attribute
from fxcollab.tree import original_name


def check_state_dict(root: nn.Module) -> None:
    """Raise for a root with a ``state_dict`` of its own, which knows no peers.

    Raises:
        StateError: with the hook that can be used instead.
    """
    if getattr(root.state_dict, "__func__", None) is not nn.Module.state_dict:
        raise StateError(
            f"{type(root).__qualname__} has a state_dict of its own.",
            where=f"{type(root).__qualname__}.state_dict",
            why="it would not be called for the training model, whose state dict would have other keys",
            hint="do the same in a hook, which is kept: register_state_dict_post_hook",
        )


def plain_attributes(root: nn.Module, modes: Modes) -> Iterator[tuple[str, Any]]:
    """The root's attributes that graphs read and that are neither modules nor registered state."""
    names = {str(node.target).split(".", 1)[0] for graph in modes for node in graph.nodes if node.op == "get_attr"}
    for name in names - root._parameters.keys() - root._buffers.keys() - root._modules.keys():
        with suppress(AttributeError):
            yield name, attribute(root, name)


def adopt_methods(module: Any) -> None:
    """Use the root's extra state and what it makes of its own entries in state dicts; see also `_adopt_attributes`.

    They are set on the class, where torch looks for them; every graph module has a class of its own.
    """
    cls: Any = type(module)
    if peers := module.__dict__["_peers"]:
        _adopt_attributes(module, peers[0])
    cls._version = module.root._version

    def load(self: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Without the peers, which the root doesn't know."""
        peers = tuple(f"{prefix}{name}." for name in self.__dict__["_peers"])
        kept = {key: state.pop(key) for key in list(state) if key.startswith(peers)}
        getattr(self.root, LOAD_OWN_STATE)(state, prefix, *args)
        state.update(kept)

    adopted = {
        "get_extra_state": lambda self: self.root.get_extra_state(),
        "set_extra_state": lambda self, state: self.root.set_extra_state(state),
        SAVE_OWN_STATE: lambda self, *args: getattr(self.root, SAVE_OWN_STATE)(*args),
        LOAD_OWN_STATE: load,
    }
    for name, method in adopted.items():
        if getattr(type(module.root), name) is not getattr(nn.Module, name):
            setattr(cls, name, method)


def _adopt_attributes(train_model: nn.Module, peers: str) -> None:
    """Let a training model, which has a class of its own, read through what it hasn't, and its original has.

    Methods that know the names of parameters answer for all branches. Others are not there, so that scripts that look
    for them find none: they don't know the other heads.
    """

    def get(self: Any, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("__") or hasattr(type(self), name) or name in self.root._modules:
                raise
        return _of_original(self, name, peers)

    cls: Any = type(train_model)
    cls.__getattr__ = get


def _of_original(train_model: Any, name: str, peers: str) -> Any:
    value = getattr(train_model.root, name)
    if getattr(value, "__self__", None) is not train_model.root or name in _AS_IS:
        return value
    answer = on_all_branches if "checkpointing" in name else _ANSWERS.get(name)
    if answer is None:
        raise AttributeError(
            f"{name!r} is a method of the original {type(train_model.root).__name__}, which doesn't know the other "
            f"heads of this training model: it is at fxcollab.original(train_model).{name}"
        )
    return answer(value, train_model, peers)


def _names_of_all_branches(method: Callable[..., Any], instance: nn.Module, peers: str) -> Callable[..., Any]:
    def names(*args: Any, **kwargs: Any) -> set[str]:
        own = set(method(*args, **kwargs))  # names, or globs
        keys = {
            name: original_name(name, peers=peers) for name, _ in instance.named_parameters(remove_duplicate=False)
        }
        found = {name for name, key in keys.items() if any(fnmatchcase(key, pattern) for pattern in own)}
        return own | {name for name in found if name != keys[name]}

    return names


def _patterns_of_all_branches(method: Callable[..., Any], instance: nn.Module, peers: str) -> Callable[..., Any]:
    prefix = rf"^(?:{re.escape(peers)}\.b\d+(?:_\d+)*\.)?"

    def of_branches(pattern: Any) -> Any:
        if isinstance(pattern, str):  # matched from the start, so that its own anchors say nothing
            return f"{prefix}(?:{_ANCHOR.sub('', pattern)})"
        if isinstance(pattern, tuple) and len(pattern) == 2 and isinstance(pattern[0], str):
            return (of_branches(pattern[0]), pattern[1])
        return type(pattern)(map(of_branches, pattern)) if isinstance(pattern, list | tuple) else pattern

    def matcher(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        if isinstance(found, Mapping):
            return {group: of_branches(patterns) for group, patterns in found.items()}
        return lambda name: found(original_name(name, peers=peers))

    return matcher


_ANCHOR = re.compile(r"(?<![\[\\])\^")
_ANSWERS: Mapping[str, Callable[[Callable[..., Any], Any, str], Callable[..., Any]]] = {
    "no_weight_decay": _names_of_all_branches,
    "group_matcher": _patterns_of_all_branches,
}
"""What timm's optimizers ask a model; methods whose names say that they concern checkpointing act on all branches."""
_AS_IS = frozenset({"get_classifier", "get_input_embeddings", "get_output_embeddings"})
"""What trainers ask for that is head 0's or the trunk's."""
