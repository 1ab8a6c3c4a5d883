"""Twins: copies of models on fake tensors, on which the user's Python can run without reaching the model."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import BuiltinMethodType
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import FakeTensor, FakeTensorMode, as_parameter, storage_id
from fxcollab.codegen.modes import set_mode
from fxcollab.deep_copy import clone_of, deep_copy, deep_copy_into, parts_of_value
from fxcollab.rng import preserve_rng_state
from fxcollab.tracing.leaks import watch

_CONTAINERS = (list, dict, set, deque)


@dataclass(frozen=True, eq=False)
class Twin:
    """A deep copy of a model in which other tensors stand for its own.

    Attributes:
        model: the copy.
        original: the model.
        tensors: the model's tensors, each with its stand-in.
        training: the mode in which the copy was put; None for that of the model.
        shared: paths of what can't be copied, and is the model's own.
        mode: makes and computes with the fake tensors; None where the stand-ins have values.
    """

    model: nn.Module
    original: nn.Module
    training: bool | None
    tensors: Sequence[tuple[Tensor, Tensor]]
    shared: tuple[str, ...]
    mode: FakeTensorMode | None

    def stand_in(self, tensor: Tensor) -> Tensor:
        """The stand-in of a tensor of the model; of any other, a new one."""
        if id(tensor) not in self._stand_ins:
            self._stand_ins[id(tensor)] = clone_of(tensor) if self.mode is None else FakeTensors(self.mode)(tensor)
        return self._stand_ins[id(tensor)]

    @cached_property
    def _stand_ins(self) -> dict[int, Tensor]:
        """The stand-in of each of the model's tensors, by the id of that tensor."""
        return {id(tensor): stand_in for tensor, stand_in in self.tensors}

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which to call the copy."""
        with preserved_classes(self.original), self.computing():
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A context like `running`, inside of one that preserves the classes already."""
        with preserve_rng_state(), without_tracebacks(), self.mode or nullcontext():
            yield

    def of_original(self, value: Any) -> Any:
        """A copy of a function, or of a value with functions in it, that refers to the model itself."""
        memo: dict[int, Any] = {id(stand_in): tensor for tensor, stand_in in self.tensors}
        originals = dict(self.original.named_modules())
        for path, module in self.model.named_modules():
            if original := originals.get(path):
                held = {key: vars(original).get(key) for key in vars(module)}
                memo |= {id(vars(module)[key]): one for key, one in held.items() if isinstance(one, _CONTAINERS)}
                memo[id(module)] = original
        for part in parts_of_value(value):
            if isinstance(part, BuiltinMethodType) and id(part.__self__) in memo:  # ``self.seen.append``
                memo[id(part)] = getattr(memo[id(part.__self__)], part.__name__)
        return deep_copy_into(memo, value, lambda tensor: tensor)[0]

    def forget(self) -> None:
        """Empty the copy's modules, which are in cycles of references, and what a run has left in them."""
        kept = set(self.original.modules())
        for module in list(self.model.modules()):
            if module not in kept:
                vars(module).clear()


def twin_of(model: nn.Module, training: bool | None = None, *, real: bool = False) -> Twin:
    """The twin of a model, in a mode if one is given, by its own ``train()``.

    With ``real`` its tensors are copies with the same values, not fake ones.
    """
    mode = None if real else FakeTensorMode(allow_non_fake_inputs=True)
    if mode is not None:
        watch(mode)
    copy_of, tensors, shared = deep_copy(model, clone_of if mode is None else FakeTensors(mode))
    twin = Twin(copy_of, model, training, tensors, shared, mode)
    if training is not None:
        with twin.running():
            set_mode(twin.model, training)
    return twin


class FakeTensors:
    """Makes fake tensors like given ones; those of views of one storage share one as well."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """A fake tensor for a tensor, a parameter for a parameter."""
        ordinary = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        if not ordinary or tensor.layout is not torch.strided or tensor.is_quantized:
            return self._mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
        made = FakeTensor(self._mode, self._meta(tensor), tensor.device)
        made.requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            as_parameter(made)
        made.__dict__.update({k: v for k, v in tensor.__dict__.items() if k not in made.__dict__})
        return made

    def _meta(self, tensor: Tensor) -> Tensor:
        key = storage_id(tensor)
        if key not in self._storages:
            size = tensor.untyped_storage().nbytes()
            self._storages[key] = torch.empty(size, dtype=torch.uint8, device="meta").untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype, device="meta")
        return made.set_(self._storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())


class Attributes:
    """The attributes of some of a model's modules as they are now, to be compared later."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._modules = {path: model.get_submodule(path) for path in paths}
        self._before = {path: _held(module) for path, module in self._modules.items()}

    def changed(self) -> list[str]:
        """The names of those that have changed since, without the mode."""
        names = []
        for path, module in self._modules.items():
            before, now = self._before[path], _held(module)
            differ = (key for key in {**before, **now} if not same_members(before.get(key, self), now.get(key, self)))
            names += [f"{path}.{key}".lstrip(".") for key in differ if key != "training"]
        return names


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _held(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, torch.jit.ScriptModule):  # which makes its attributes when they are read
        return {}
    held = dict(vars(module))
    for name in _REGISTRIES:
        held |= held.pop(name)
    return {name: _contents(value) for name, value in held.items()}


def _contents(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value


def same_members(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or containers of the same objects."""
    if one is other or not isinstance(one, _CONTAINERS):
        return one is other
    if type(one) is not type(other) or len(one) != len(other):
        return False
    pairs = one.items() if isinstance(one, dict) else enumerate(one)
    others = dict(other.items() if isinstance(other, dict) else enumerate(other))
    return all(others.get(key, others) is value for key, value in pairs)


@contextmanager
def preserved_classes(model: nn.Module) -> Iterator[None]:
    """On leaving, restore the attributes of the classes of a model's modules, which its twins share."""
    classes = {cls for part in model.modules() for cls in type(part).__mro__}
    before = {cls: _attributes(cls) for cls in classes if cls.__module__.partition(".")[0] not in _LIBRARIES}
    try:
        yield
    finally:
        for cls, attributes in before.items():
            _restore(cls, attributes)


_LIBRARIES = ("builtins", "fxcollab", "torch")


def _attributes(cls: type) -> dict[str, tuple[Any, Any]]:
    """The attributes of a class, each with a copy of its members if it is a list, a dict or a set."""
    own = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
    return {name: (value, _contents(value)) for name, value in own.items()}


def _restore(cls: type, before: Mapping[str, tuple[Any, Any]]) -> None:
    now = vars(cls)
    for name in [name for name in now if not name.startswith("__") and name not in before]:
        delattr(cls, name)
    for name, (value, members) in before.items():
        if now.get(name) is not value:
            setattr(cls, name, value)
        if not same_members(members, value) and isinstance(value, _CONTAINERS):
            value.clear()
            value.extend(members) if isinstance(value, list | deque) else value.update(members)


@contextmanager
def without_tracebacks() -> Iterator[None]:
    """Disable the logger that prints a traceback for every error on fake tensors."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
