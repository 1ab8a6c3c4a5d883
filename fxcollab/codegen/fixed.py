"""What a graph has the value of, as the forward that was traced had: a call that would need others is noticed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from fxcollab._torch import pytree
from fxcollab.errors import GuardError

Attributes: TypeAlias = Mapping[tuple[str, str], Any]
_PLAIN = frozenset({type(None), bool, int, float, complex, str})
_SHOWN = 80  # characters of a value


def is_plain(value: Any) -> bool:
    """Whether it is a number, a text, None or a tuple of such, which can be compared."""
    return type(value) in _PLAIN or (type(value) is tuple and all(map(is_plain, value)))


@dataclass(frozen=True)
class Fixed:
    """What graphs have the values of.

    Attributes:
        train: attributes of modules in train mode, which ``train()`` may set, by the module's path and their names.
        evaluation: those in eval mode.
        arguments: parameters of the forward that are no inputs, by name.
    """

    train: Attributes = field(default_factory=dict)
    evaluation: Attributes = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def now(self, root: nn.Module, written: Collection[tuple[nn.Module, str]]) -> Fixed:
        """The same, with the values that the ``written`` attributes of modules in ``root`` have now."""
        modules = dict(root.named_modules(remove_duplicate=False))

        def updated(attributes: Attributes) -> Attributes:
            now = (key for key in attributes if (modules.get(key[0]), key[1]) in written)
            return {**attributes, **{key: vars(modules[key[0]]).get(key[1], attributes[key]) for key in now}}

        return replace(self, train=updated(self.train), evaluation=updated(self.evaluation))


def with_check(call: Callable[..., Any], root: nn.Module, fixed: Fixed, names: Collection[str]) -> Callable[..., Any]:
    """``call`` of a graph module, which raises a `GuardError` where an attribute or argument isn't the graph's.

    Also where an attribute of the root is set on the graph module itself, where no forward reads it; ``names`` are
    those of its own attributes. Arguments that are the graph's are accepted where the original takes them.
    """
    parameters = inspect.signature(root.forward).parameters.values() if fixed.arguments else ()
    takes = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    places = {index for index, name in enumerate(takes) if name in fixed.arguments}
    modules, own = dict(root.named_modules(remove_duplicate=False)), frozenset(names)
    train, evaluation = (
        [(modules[path], path, name, value) for (path, name), value in attributes.items() if path in modules]
        for attributes in (fixed.train, fixed.evaluation)
    )

    def check_argument(name: str, now: Any) -> None:
        value = fixed.arguments[name]
        if not _is_same(value, now):
            raise GuardError(
                f"The graph was captured where the argument {name} is {_shown(value)}; here it is {_shown(now)}.",
                where=f"{type(root).__qualname__}.forward",
                why="the forward may take a different branch, and values that are not tensors are no inputs",
                hint="give it in example_inputs when you transform; your own model takes any: "
                "fxcollab.original(train_model), prune(train_model, into=build_model())",
            )

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module, path, name, value in train if self.training else evaluation:
            now = getattr(module, name, module)
            if not path and _is_same(value, now) and name in self.__dict__ and name not in own:
                now = self.__dict__[name]
            if _is_same(value, now):
                continue
            if torch.compiler.is_compiling():  # which can't make the error that has more to say
                raise RuntimeError(f"The attribute {name} is not what it was when the graph was captured.")
            raise GuardError(
                f"The graph was captured where {f'{path}.{name}'.lstrip('.')} is {_shown(value)}; here it is "
                f"{'gone' if now is module else _shown(now)}.",
                where=f"{type(module).__qualname__}.{name}",
                why="the graph has the values that attributes had when the model was transformed",
                hint="switch it by the training model's own methods"
                if "checkpointing" in name
                else "transform again after setting it; what changes during training may be a buffer, or be read "
                "in a module of its own, which becomes one node",
            )
        if fixed.arguments:
            for name, now in (*zip(takes, args, strict=False), *kwargs.items()):
                if name in fixed.arguments:
                    check_argument(name, now)
            args = tuple(value for index, value in enumerate(args) if index not in places)
            kwargs = {name: value for name, value in kwargs.items() if name not in fixed.arguments}
        if torch.compiler.is_compiling():  # which doesn't trace what fx calls
            return nn.Module.__call__(self, *args, **kwargs)
        return call(self, *args, **kwargs)

    return checked


def _is_same(value: Any, now: Any) -> bool:
    if isinstance(now, bool | int | float | complex | str | tuple) and is_plain(value):
        return bool(now == value) or bool(now != now and value != value)  # nan
    if type(value) in (list, dict) and type(now) is type(value):
        ours, theirs = pytree.tree_flatten(value), pytree.tree_flatten(now)
        return ours[1] == theirs[1] and all(map(_is_same, ours[0], theirs[0]))
    return value is now


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN] if is_plain(value) else f"of type {type(value).__qualname__}"
