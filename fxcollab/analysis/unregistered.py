"""State that modules reach without registering it.

A module that is kept whole is one node, and only the state that it registers is known. A parameter in a tuple, a
module in ``self.__dict__`` or in a function's closure goes unnoticed: its gradient isn't rescaled, and a peer may
compute with head 0's. It depends on levels and on how peers are copied whether that is correct:

- A deep copy follows attributes through containers, ``partial``, bound methods and objects. State of the module's own
  level becomes the branch's own, wherever it is registered.
- Functions, weak references and opened modules are not copied: what is reached through them stays head 0's.
- A parameter of a shallower level would be shared unrescaled, and so would a module's own where it is called on both
  sides of a split. Of a deeper level there are several, of which the module would reach one.
- A buffer of the trunk exists once, and all branches read the same one, so a reference to it is correct unless a
  branch writes into it, which isn't checked here.

Hooks are left out: most of them refer to modules which they only observe.
"""

from __future__ import annotations

import dis
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

from torch import Tensor, fx, nn

from fxcollab.errors import SplitError
from fxcollab.functional import tensors_of


def refuse_unregistered_state(
    root: nn.Module, nodes: Iterable[Mapping[fx.Node, int]], state: Mapping[str, int], splits: Sequence[str]
) -> None:
    """Raise for modules that reach state of the model which their branches would not have, or not rescale.

    ``nodes`` are the levels of every graph's nodes, ``state`` those of parameters and buffers by name.

    Raises:
        SplitError: with what reaches what, and the way out.
    """
    calls = _calls(root, nodes)
    registry = _Registry(root, calls, state, splits)
    for call in calls:
        _check_call(call, registry)


@dataclass(frozen=True, eq=False)
class _Call:
    """A module that is called as one node, with the levels of its first and of its deepest call."""

    path: str
    module: nn.Module
    first: int
    deepest: int


def _calls(root: nn.Module, nodes: Iterable[Mapping[fx.Node, int]]) -> list[_Call]:
    found: dict[nn.Module, _Call] = {}
    for levels in nodes:
        for node, level in levels.items():
            if node.op == "call_module":
                module = root.get_submodule(str(node.target))
                known = found.get(module, _Call(str(node.target), module, level, level))
                found[module] = _Call(known.path, module, min(known.first, level), max(known.deepest, level))
    return list(found.values())


class _Registry:
    """The state that a model registers, by name and level, and its modules, of which some were opened."""

    def __init__(
        self, root: nn.Module, calls: Iterable[_Call], state: Mapping[str, int], splits: Sequence[str]
    ) -> None:
        self.levels, self.splits = state, splits
        self._names: dict[int, str] = {}
        for name, tensor in tensors_of(root).items():
            self._names.setdefault(id(tensor), name)
        self._paths = {id(module): path for path, module in root.named_modules()}
        kept = {id(part) for call in calls for part in call.module.modules()}
        around = {path for call in calls for path in ("", *accumulate(call.path.split(".")[:-1], "{}.{}".format))}
        self._opened = {id(root.get_submodule(path)) for path in around} - kept

    def names(self, value: nn.Module | Tensor) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters and buffers in ``value``, with their names."""
        tensors = tensors_of(value).values() if isinstance(value, nn.Module) else (value,)
        return ((self._names[id(tensor)], tensor) for tensor in tensors if id(tensor) in self._names)

    def path(self, value: nn.Module | Tensor) -> str | None:
        """The path of a module of the model."""
        return self._paths.get(id(value))

    def was_opened(self, value: nn.Module | Tensor) -> bool:
        """Whether ``value`` is a module around those that are called as one node."""
        return id(value) in self._opened


@dataclass(frozen=True, eq=False)
class _Reached:
    """A value that a part of a called module reaches.

    Attributes:
        part: the path of the part.
        way: from the part to the value, as an expression.
        copied: whether a copy of the part has a copy of the value.
        inside: whether it is inside of an object of some class.
    """

    part: str
    way: str
    value: Any
    copied: bool = True
    inside: bool = False


def _check_call(call: _Call, registry: _Registry) -> None:
    own = {id(part) for part in call.module.modules()}
    for found in _reached_by(call):
        copied = found.copied and not registry.was_opened(found.value)
        if id(found.value) in own and (copied or call.first == 0):
            continue  # a call replaces the module's own parameters, whichever way they are reached
        for name, tensor in registry.names(found.value):
            if not _is_correct(tensor, registry.levels[name], call, copied):
                raise _refusal(call, found, name, registry)


def _is_correct(tensor: Tensor, level: int, call: _Call, copied: bool) -> bool:
    """Whether each branch reaches its own instance, and shares none that has a gradient."""
    reaches_its_own = level <= call.first and (copied or level == 0)
    has_gradient = isinstance(tensor, nn.Parameter) or tensor.requires_grad
    return reaches_its_own and (level == call.deepest or not has_gradient)


def _refusal(call: _Call, found: _Reached, name: str, registry: _Registry) -> SplitError:
    path, level = registry.path(found.value), registry.levels[name]
    around = path is not None and found.part.startswith(f"{path}." if path else "")
    what = "the model around it" if path == "" else repr(path or name)
    if level > call.first:
        why = f"each branch behind has a {name!r} of its own, of which it would reach head 0's"
    elif 0 < level == call.deepest:
        why = f"functions, weak references and opened modules aren't copied: every head would use head 0's {name!r}"
    else:
        why = f"the branches would share {name!r}, and its gradient could not be rescaled to their mean"
    hints = [f"register what it uses on {found.part!r} itself, as in self.w = w: tied state is handled"]
    if not found.copied:
        hints.append("give a function that is set on a module its self: types.MethodType(function, module)")
    if registry.splits and not around:
        hints.append("or put the splits behind both")
    return SplitError(
        f"{found.part!r} reaches {what} without registering it.",
        where=f"{found.part}{found.way}",
        why=why,
        hint="; ".join(hints),
    )


def _reached_by(call: _Call) -> Iterator[_Reached]:
    """The modules and tensors that attributes lead to."""
    for path, part in call.module.named_modules(prefix=call.path):
        seen: set[tuple[int, bool, bool]] = set()
        for name, value in _attributes(part, copied=call.first > 0):
            yield from _follow(_Reached(path, f".{name}", value), seen)


# Registries and hooks; and what recurrent modules update at every call.
_OF_TORCH = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}


def _attributes(module: nn.Module, copied: bool) -> Iterator[tuple[str, Any]]:
    """The module's attributes, those that a copy of it has where it is copied, and its class's forward."""
    yield "forward", getattr(type(module), "forward", None)
    attributes = _state(module) if copied else vars(module)
    yield from ((name, value) for name, value in attributes.items() if name not in _OF_TORCH)


def _state(module: Any) -> dict[str, Any]:
    try:
        state = module.__getstate__()
    except Exception:  # whatever the module's class raises, and raises again where it is copied
        state = None
    return state if isinstance(state, dict) else vars(module)


def _follow(found: _Reached, seen: set[tuple[int, bool, bool]]) -> Iterator[_Reached]:
    """The modules and tensors that are ``found`` or lie in it, except inside of objects that lie in other objects."""
    key = (id(found.value), found.copied, found.inside)
    if isinstance(found.value, _PLAIN) or key in seen:
        return
    seen.add(key)
    if isinstance(found.value, nn.Module | Tensor):
        yield found
        return
    is_object = not isinstance(found.value, _KNOWN)
    if is_object and found.inside:
        return
    for step, value, along in _parts(found.value):
        inner = _Reached(found.part, found.way + step, value, found.copied and along, found.inside or is_object)
        yield from _follow(inner, seen)


_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, ModuleType)
_MEMBERS = (list, tuple, set, frozenset, deque)
_KNOWN = (*_MEMBERS, dict, partial, MethodType, BuiltinMethodType, FunctionType, ReferenceType)


def _parts(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """The way to each part of ``value``, the part, and whether it is copied along with ``value``."""
    if isinstance(value, _MEMBERS):
        yield from ((f"[{i}]", member, True) for i, member in enumerate(value))
    elif isinstance(value, dict):
        for i, (key, item) in enumerate(value.items()):
            yield f" (key {i})", key, True
            yield f"[{key!r}]" if isinstance(key, str | int) else f" (value {i})", item, True
    elif isinstance(value, partial):
        yield from ((f".{name}", getattr(value, name), True) for name in ("func", "args", "keywords"))
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__, True
        yield "", value.__func__, False
    elif isinstance(value, BuiltinMethodType):
        yield ".__self__", value.__self__, False
    elif isinstance(value, ReferenceType):
        yield "()", value(), False
    elif isinstance(value, FunctionType):
        yield from ((way, part, False) for way, part in _parts_of_function(value))
    else:
        yield from ((f".{name}", part, True) for name, part in getattr(value, "__dict__", {}).items())


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    yield ".__defaults__", function.__defaults__
    yield ".__kwdefaults__", function.__kwdefaults__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f" (variable {name})", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from ((f" (variable {name})", function.__globals__[name]) for name in _globals(function))


def _globals(function: FunctionType) -> Iterator[str]:
    """Names of global modules and tensors that the function's code reads."""
    for code in _codes(function.__code__):
        for name in code.co_names:
            if isinstance(function.__globals__.get(name), nn.Module | Tensor) and _loads(code, name):
                yield name


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _loads(code: CodeType, name: str) -> bool:
    """Whether ``name`` is read as a global, not as an attribute."""
    return any(one.opname == "LOAD_GLOBAL" and one.argval == name for one in dis.get_instructions(code))
