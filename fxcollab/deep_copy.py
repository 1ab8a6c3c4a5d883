"""Deep copies of modules and of all that they hold.

Beyond ``copy.deepcopy``, the caller says how a tensor is copied; tensors keep their attributes, and so do subclasses
of ``fx.GraphModule``; functions, such as hooks and replaced forwards, get copies of what their closures and defaults
hold; what can't be copied may be shared, and what releases something when it is deleted always is.
"""

from __future__ import annotations

import copy
from collections import ChainMap, OrderedDict, deque
from collections.abc import (
    Callable,
    Container,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    ValuesView,
)
from contextlib import nullcontext
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxcollab._torch import FakeTensor

T = TypeVar("T")

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, ModuleType, torch.dtype, torch.device, torch.Size)
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class Memo(dict[int, Any]):
    """The memo of a deep copy, which also has what is ``known``; a dict, since scripted modules take no other."""

    def __init__(self, known: Mapping[int, Any]) -> None:
        super().__init__()
        self._known = known

    def __missing__(self, key: int) -> Any:
        return self._known[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._known

    def get(self, key: int, default: Any = None) -> Any:
        """The copy, or what is known."""
        return super().get(key, self._known.get(key, default))


def deep_copy(
    value: T, tensor: Callable[[Tensor], Tensor], share: Iterable[object] = (), *, share_functions: bool = False
) -> tuple[T, list[tuple[Tensor, Tensor]], tuple[str, ...]]:
    """A copy of ``value``, a module or a tuple of modules, with ``tensor`` of each tensor; see `deep_copy_into`.

    What can't be copied, and the objects to ``share``, are shared. Returns the copy, each tensor that was copied with
    its copy, and the paths of attributes that can't be copied: ``layer1.lock``.
    """
    known = {id(part): part for part in share}
    roots: Any = value if isinstance(value, tuple) else (value,)
    try:
        made = deep_copy_into(dict(known), value, tensor, share_functions=share_functions)
        parts = ((path, part) for root in roots for path, part in root.named_modules())
        held = ((f"{path}.{name}".lstrip("."), one) for path, part in parts for name, one in vars(part).items())
        return *made, tuple(path for path, one in held if _releases(one))
    except Exception:  # whatever its parts raise
        names = {module: path for root in roots for path, module in reversed(list(root.named_modules()))}
        shared = uncopyable(((names.get(m, type(m).__qualname__), m) for m in _modules_of(value, ())), {})
        known |= {id(part): part for part in shared.values()}
        return *deep_copy_into(known, value, tensor, share_functions=share_functions), tuple(shared)


def deep_copy_into(
    memo: dict[int, Any], value: T, tensor: Callable[[Tensor], Tensor], *, share_functions: bool = False
) -> tuple[T, list[tuple[Tensor, Tensor]]]:
    """A copy of ``value``, and the tensors that were copied with their copies.

    Args:
        memo: known copies by the id of their original, as for ``copy.deepcopy``; gets the new ones.
        value: a module, a tuple of modules, or any other value.
        tensor: makes the copy of a tensor that the memo doesn't have; called once for each.
        share_functions: whether functions that hold nothing of ``value``'s modules, and nothing that the memo has
            another copy of, stay what they are, and so do the lists and dicts that they hold.

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

    modules = dict.fromkeys(_modules_of(value, memo))

    def changes(part: Any) -> bool:
        if not share_functions:
            return True
        if isinstance(part, nn.Module) and id(part) not in memo:
            return part in modules or any(memo.get(id(own), own) is not own for own in _tensors_in(part.modules()))
        return memo.get(id(part), part) is not part

    graphs = [_graph_module(module, memo) for module in modules if _is_plain_graph(module)]
    for own in _tensors_in(modules):
        copied(own)
    attributes = (one for module in modules for one in vars(module).values())
    memo.update(
        (id(one), type(one)()) for one in attributes if type(one) in (dict, OrderedDict) and not one
    )  # quicker
    held = [value, *(held for module in modules for held in attributes_of_module(module))]
    functions = [fill for one in held for fill in _held_functions(one, memo, copied, changes)]
    scripted = [module for module in modules if isinstance(module, torch.jit.ScriptModule) and id(module) not in memo]
    with _StrayTensors(copied), torch.no_grad() if scripted else nullcontext():  # they clone their own tensors
        for fill in graphs:  # first: copies of others around them generate their code again, and that of these
            fill()
        made = copy.deepcopy(value, memo)
        for fill in functions:
            fill()
        for own, new in tensors:  # which grow meanwhile
            copy_attributes(own, new, memo, copied)
    for module in (each for each in scripted if id(each) in memo):  # the others are in these
        for own, new in zip(module.parameters(), memo[id(module)].parameters(), strict=True):
            new.requires_grad_(own.requires_grad)
    return made, tensors


def copy_attributes(
    own: Tensor, new: Tensor, memo: dict[int, Any], tensor: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Give a tensor's copy what was set on the tensor: copies, in which modules that weren't copied are shared.

    ``tensor`` makes those of tensors, by default clones. What can't be copied and has none is shared.

    Raises:
        Exception: whatever is raised by what can't be copied and has tensors.
    """
    for name, held in vars(own).items() if new is not own and not isinstance(own, FakeTensor) else ():
        for part in parts_of_value(held):
            if id(part) not in memo and (isinstance(part, nn.Module) or _releases(part)):
                memo[id(part)] = part
        with _StrayTensors(tensor or clone_of):
            try:
                held = copy.deepcopy(held, memo)
            except Exception:  # whatever it raises, such as a process group
                if any(isinstance(part, Tensor) for part in parts_of_value(held)):
                    raise
        vars(new)[name] = held


def _releases(part: Any) -> bool:
    """Whether an object does something when it is deleted, which its copy would do too soon; modules are copied."""
    owns = hasattr(type(part), "__del__") and not hasattr(type(part), "__deepcopy__")
    return owns and not isinstance(part, nn.Module | Tensor)


def _modules_of(value: Any, known: Container[int]) -> list[nn.Module]:
    """The modules in ``value``, and those that they hold unregistered, without ``known`` ones."""
    found: dict[nn.Module, None] = {}
    pending = [value]
    while pending:
        for part in parts_of_value(pending.pop()):
            if isinstance(part, nn.Module):
                for module in part.modules():
                    if module not in found and id(module) not in known:
                        found[module] = None
                        pending += attributes_of_module(module)
    return list(found)


def attributes_of_module(module: nn.Module) -> Iterator[Any]:
    """The values of a module's attributes, without empty dicts, which most are."""
    for key, held in vars(module).items():
        if key not in _REGISTRIES and not (isinstance(held, dict) and not held):
            yield held


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


def _tensors_in(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from (held for held in (*module._parameters.values(), *module._buffers.values()) if held is not None)


def _graph_module(module: Any, memo: dict[int, Any]) -> Callable[[], object]:
    """``fx.GraphModule.__deepcopy__`` drops the attributes of subclasses."""
    cls: Any = type(module)  # every one has a class of its own
    memo[id(module)] = new = cls.__new__(cls)
    type(new).forward = type(module).forward

    def fill() -> None:
        new.__dict__.update(copy.deepcopy(module.__dict__, memo))
        new.__dict__["_graph"].owning_module = new

    return fill


def _held_functions(
    value: Any, memo: dict[int, Any], copied: Callable[[Tensor], Tensor], changes: Callable[[Any], bool]
) -> Iterator[Callable[[], object]]:
    """Enter copies of the functions in ``value`` that hold anything which ``changes``, and of others.

    What is returned fills them afterwards.
    """
    methods = []
    for part in parts_of_value(value):
        if isinstance(part, nn.Parameter):  # whose class makes copies without ``__torch_function__``
            copied(part)
        elif id(part) in memo:
            continue
        elif isinstance(part, torch.Generator):  # which would copy its state as a tensor
            memo[id(part)] = part.clone_state()
        elif _releases(part):
            memo[id(part)] = part
        elif isinstance(part, MethodType):
            methods.append(part)
        elif isinstance(part, FunctionType) and any(
            changes(inner) for held in _held_by(part) for inner in parts_of_value(held)
        ):
            cells = tuple(CellType() for _ in part.__closure__ or ())
            memo[id(part)] = new = FunctionType(part.__code__, part.__globals__, part.__name__, None, cells)
            yield partial(_fill, part, new, memo)
    for method in methods:
        if id(method.__func__) in memo:  # whose copy ``copy.deepcopy`` wouldn't use; a method can't be filled later
            memo[id(method)] = bound = partial(method.__func__)
            yield partial(_bind, method, bound, memo)


def _bind(method: MethodType, bound: Any, memo: Any) -> None:
    bound.__setstate__((memo[id(method.__func__)], (copy.deepcopy(method.__self__, memo),), {}, {}))


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


def parts_of_value(value: Any) -> Iterator[Any]:
    """``value``, and what lies in it: members, attributes, what functions hold; but not what lies in modules."""
    pending, seen = [value], set[int]()
    while pending:
        part = pending.pop()
        if id(part) in seen or isinstance(part, _PLAIN):
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            pending += (*part, *part.values())
        elif isinstance(part, list | tuple | set | frozenset | deque | KeysView | ValuesView | ItemsView):
            pending += part
        elif isinstance(part, partial):
            pending += (part.func, part.args, part.keywords)
        elif isinstance(part, MethodType):
            pending += (part.__func__, part.__self__)
        elif isinstance(part, FunctionType):
            pending += _held_by(part)
        elif not isinstance(part, Tensor | nn.Module):
            pending.append(attributes_of(part))


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots too; the dict that the object has where there are no slots."""
    own: dict[str, Any] = getattr(value, "__dict__", {})
    if isinstance(value, type | ModuleType):
        return {}
    slots = [vars(cls)["__slots__"] for cls in type(value).__mro__ if "__slots__" in vars(cls)]
    names = [name for some in slots for name in ([some] if isinstance(some, str) else some)]
    return {**own, **{name: getattr(value, name) for name in names if hasattr(value, name)}} if names else own


def uncopyable(modules: Iterable[tuple[str, nn.Module]], memo: MutableMapping[int, Any]) -> dict[str, Any]:
    """What can't be copied, by path: attributes of ``modules``, or modules where no attribute is why.

    ``modules`` have their paths; ``memo`` has known copies.
    """
    paths = {module: path for path, module in modules}
    kept: dict[int, Any] = {id(module): module for module in paths}
    shared: dict[int, Any] = {}
    found: dict[str, Any] = {}

    def check(path: str, part: Any, *known: dict[int, Any]) -> None:
        try:
            deep_copy_into(Memo(ChainMap(shared, *known, memo)), part, lambda tensor: tensor)
        except Exception:  # whatever its parts raise
            found[path] = shared[id(part)] = part

    for module, path in paths.items():
        for name, part in vars(module).items():
            check(f"{path}.{name}".lstrip("."), part, kept)
    for module, path in paths.items():
        check(path, module, {key: other for key, other in kept.items() if other is not module})
    return found


def clone_of(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` with storage of its own, a parameter for a parameter; also of meta and fake ones."""
    made = parameter_like(tensor, tensor.detach().clone())
    made.__dict__.update(tensor.__dict__)
    return made


def parameter_like(tensor: Tensor, data: Tensor) -> Tensor:
    """``data`` as a parameter of its class if ``tensor`` is one; it requires gradients as ``tensor`` does."""
    if isinstance(tensor, nn.Parameter):
        cls = type(tensor) if issubclass(type(tensor), nn.Parameter) else nn.Parameter  # not by its own constructor
        data = nn.Parameter.__new__(cls, data, tensor.requires_grad)
    return data.requires_grad_(tensor.requires_grad)
