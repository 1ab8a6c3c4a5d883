"""Deep copies of modules and of all that they hold.

Beyond ``copy.deepcopy``, the caller says how a tensor is copied; functions, such as hooks and replaced forwards, get
copies of what their closures and defaults hold; subclasses of ``fx.GraphModule`` keep their attributes; and what
can't be copied may be shared.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator, MutableMapping
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
Memo = MutableMapping[int, Any]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, ModuleType, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, eq=False)
class Copied(Generic[T]):
    """What `deep_copy` returns.

    Attributes:
        value: the copy.
        tensors: each tensor that was copied, with its copy.
        shared: paths of what can't be copied, and is the original's: ``layer1.lock``.
    """

    value: T
    tensors: list[tuple[Tensor, Tensor]]
    shared: tuple[str, ...] = ()


def deep_copy(value: T, tensor: Callable[[Tensor], Tensor]) -> Copied[T]:
    """A copy of ``value``, a module or a tuple of modules, with ``tensor`` of each tensor; see `deep_copy_into`.

    What can't be copied is shared.
    """
    try:
        return Copied(*deep_copy_into({}, value, tensor))
    except Exception:  # whatever its parts raise
        shared, paths = _uncopyable(value)
        return Copied(*deep_copy_into(shared, value, tensor), paths)


def deep_copy_into(
    memo: Memo, value: T, tensor: Callable[[Tensor], Tensor], *, all_functions: bool = True
) -> tuple[T, list[tuple[Tensor, Tensor]]]:
    """A copy of ``value``, and the tensors that were copied with their copies.

    Args:
        memo: known copies by the id of their original, as for ``copy.deepcopy``; gets the new ones.
        value: a module, a tuple of modules, or any other value.
        tensor: makes the copy of a tensor that the memo doesn't have; called once for each.
        all_functions: whether functions are copied that hold anything at all; else only those that hold what is
            copied anyway, or has a copy, so that a hook may fill a list of the caller's for several copies.

    Raises:
        Exception: whatever a part raises that can't be copied.
    """
    tensors: list[tuple[Tensor, Tensor]] = []

    def copied(original: Tensor) -> Tensor:
        if id(original) not in memo:
            memo[id(original)] = tensor(original)
            tensors.append((original, memo[id(original)]))
        found: Tensor = memo[id(original)]
        return found

    parts = list(_reached(value, memo))
    functions = [part for part in parts if isinstance(part, FunctionType) and _held_by(part)]
    if functions and not all_functions:
        anyway = {id(part) for part in _reached(value, memo, functions=False) if not isinstance(part, _FIXED)}
        functions = [
            one
            for one in functions
            if any(id(part) in anyway or memo.get(id(part), part) is not part for part in parts_of_value(one))
        ]
    graphs = [part for part in parts if isinstance(part, nn.Module) and _is_plain_graph(part)]
    fills = [_function(function, memo) for function in functions]
    for part in parts:
        if isinstance(part, Tensor):  # the class of parameters makes copies without ``__torch_function__``
            copied(part)
        elif isinstance(part, torch.Generator):  # which would copy its state as a tensor
            memo[id(part)] = part.clone_state()
        elif type(part) in (dict, OrderedDict) and not part:  # most attributes of modules, which torch copies slowly
            memo[id(part)] = type(part)()
    with _StrayTensors(copied):
        # Graphs first: copies of others around them generate their code again, and that of these.
        for fill in [_graph_module(graph, memo) for graph in graphs]:
            fill()
        made = copy.deepcopy(value, memo)  # type: ignore[arg-type]
        for fill in fills:
            fill()
    return made, tensors


_FIXED = (tuple, frozenset, FunctionType, BuiltinFunctionType)


def _reached(value: Any, memo: Memo, *, functions: bool = True) -> Iterator[Any]:
    """What lies in ``value`` and in the modules there, also those that aren't registered, and has no copy yet."""
    pending, seen = [value], set[int]()
    while pending:
        for part in parts_of_value(pending.pop(), seen, memo, functions=functions):
            yield part
            if isinstance(part, nn.Module):
                pending.append(vars(part))


class _StrayTensors(TorchFunctionMode):
    """Copies tensors that lie in lists, dicts and other objects."""

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._copied = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self._copied(args[0])
        return func(*args, **(kwargs or {}))


def _is_plain_graph(module: nn.Module) -> bool:
    return getattr(type(module), "__deepcopy__", None) is fx.GraphModule.__deepcopy__


def _graph_module(module: Any, memo: Memo) -> Callable[[], object]:
    """``fx.GraphModule.__deepcopy__`` drops the attributes of subclasses."""
    cls: Any = type(module)  # every one has a class of its own
    memo[id(module)] = new = cls.__new__(cls)
    type(new).forward = type(module).forward

    def fill() -> None:
        new.__dict__.update(copy.deepcopy(module.__dict__, memo))  # type: ignore[arg-type]
        new.__dict__["_graph"].owning_module = new

    return fill


def _function(function: FunctionType, memo: Memo) -> Callable[[], object]:
    """Functions aren't copied by ``copy.deepcopy``."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    new = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    memo[id(function)] = new
    return partial(_fill, function, new, memo)


def _fill(function: FunctionType, new: FunctionType, memo: Any) -> None:
    for attribute in ("__defaults__", "__kwdefaults__", "__dict__"):
        setattr(new, attribute, copy.deepcopy(getattr(function, attribute), memo))
    new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
    for cell, old in zip(new.__closure__ or (), function.__closure__ or (), strict=True):
        try:
            cell.cell_contents = copy.deepcopy(old.cell_contents, memo)
        except ValueError:  # not assigned yet
            continue


def _held_by(function: FunctionType) -> list[Any]:
    """What the closure and the defaults of a function hold and would be copied."""
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return [one for one in held if not isinstance(one, _PLAIN)]


def parts_of_value(
    value: Any, seen: set[int] | None = None, known: Container[int] = (), *, functions: bool = True
) -> Iterator[Any]:
    """``value``, and what lies in it: members, attributes and what ``functions`` hold; but not in modules.

    What is in ``seen`` or ``known`` is passed over; ids of the parts are added to ``seen``.
    """
    pending, seen = [value], set[int]() if seen is None else seen
    while pending:
        part = pending.pop()
        if isinstance(part, _PLAIN) or id(part) in seen or id(part) in known:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            pending += part.values()
        elif isinstance(part, list | tuple | set | frozenset | deque):
            pending += part
        elif isinstance(part, partial):
            pending += (part.func, part.args, part.keywords)
        elif isinstance(part, MethodType):
            pending += (part.__func__, part.__self__)
        elif isinstance(part, FunctionType):
            pending += _held_by(part) if functions else ()
        elif not isinstance(part, Tensor | nn.Module):
            pending += getattr(part, "__dict__", {}).values()


def _uncopyable(value: Any) -> tuple[dict[int, Any], tuple[str, ...]]:
    """Attributes that can't be copied, or modules where no attribute is why: by their ids, and their paths."""
    roots = value if isinstance(value, tuple) else (value,)
    held = {part: type(part).__qualname__ for part in _reached(value, {}) if isinstance(part, nn.Module)}
    modules = held | {module: path for root in roots for path, module in root.named_modules()}
    kept: dict[int, Any] = {id(module): module for module in modules}
    shared: dict[int, Any] = {}
    paths: list[str] = []
    for module, path in modules.items():
        for name, part in vars(module).items():
            if not is_copyable(part, {**kept, **shared}):
                shared[id(part)] = part
                paths.append(f"{path}.{name}".lstrip("."))
    for module, path in modules.items():
        others = {key: other for key, other in kept.items() if other is not module}
        if not is_copyable(module, {**others, **shared}):
            shared[id(module)] = module
            paths.append(path)
    return shared, tuple(paths)


def is_copyable(value: Any, memo: Memo) -> bool:
    """Whether ``value`` can be copied; ``memo`` has known copies, and gets others."""
    try:
        deep_copy_into(memo, value, lambda tensor: tensor)
    except Exception:  # whatever its parts raise
        return False
    return True
