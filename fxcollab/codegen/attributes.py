"""A training model has the attributes of its original, and those methods that optimizers of libraries ask for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from fxcollab.codegen.checkpointing import on_all_branches
from fxcollab.tree import original_name


def adopt_attributes(train_model: nn.Module, root: nn.Module, peers: str) -> None:
    """Let a training model, which has a class of its own, read through what it hasn't, and its original has.

    Values are read when they are asked for. Methods that know the names of parameters answer for all branches; others
    are not there, so that scripts that look for them find none: they don't know the other heads. These are
    descriptors, as ``__getattr__`` would be asked for every submodule at every call.
    """
    cls: Any = type(train_model)
    bases = (base for base in type(root).__mro__ if base not in fx.GraphModule.__mro__)
    of_class = {name for base in bases if not issubclass(base, fx.GraphModule) for name in vars(base)}
    state = root._modules.keys() | root._parameters.keys() | root._buffers.keys()
    for name in (vars(root).keys() | of_class) - state:
        if not name.startswith("__") and not hasattr(cls, name) and name not in vars(train_model):
            setattr(cls, name, _OfOriginal(name, peers))


class _OfOriginal:
    """Reads an attribute of the original; an instance's own attribute of that name comes first."""

    def __init__(self, name: str, peers: str) -> None:
        self._name, self._peers = name, peers

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        value = getattr(instance.root, self._name)
        if getattr(value, "__self__", None) is not instance.root:
            return value
        if self._name not in _ANSWERS:
            raise AttributeError(self._name)  # which torch words anew
        return _ANSWERS[self._name](value, instance, self._peers)


def _as_is(method: Callable[..., Any], instance: nn.Module, peers: str) -> Callable[..., Any]:
    return method


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
    "no_weight_decay": _names_of_all_branches,  # timm
    "group_matcher": _patterns_of_all_branches,
    "set_grad_checkpointing": on_all_branches,
    "get_classifier": _as_is,
    "get_input_embeddings": _as_is,  # transformers
    "get_output_embeddings": _as_is,
    "activation_checkpointing_enable": on_all_branches,
    "activation_checkpointing_disable": on_all_branches,
    "gradient_checkpointing_enable": on_all_branches,  # their names before
    "gradient_checkpointing_disable": on_all_branches,
}
"""What optimizers and trainers ask a model."""
