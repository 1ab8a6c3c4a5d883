"""Repeats: of calls of equal modules on a twin one is run, and the others return tensors like its own.

Calls are equal if the modules are of one class, with equal attributes and tensors of equal shapes, and so are the
arguments: on fake tensors, which have no values, the forward does the same again. Attributes that are other objects
have to be the same ones. A call that changes any of that, or returns what it was given, is run every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxcollab._torch import DisableTorchFunction, FakeTensor, pytree, storage_id, version_of
from fxcollab.analysis.operations import Operations
from fxcollab.contents import Contents
from fxcollab.deep_copy import attributes_of_module
from fxcollab.functional import named_tensors, tensors_of

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


class Kind(NamedTuple):
    """What is known of a fake tensor."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    device: torch.device
    requires_grad: bool
    is_leaf: bool

    @classmethod
    def of(cls, tensor: Any) -> Kind:
        """That of a tensor."""
        flags = tensor.requires_grad, tensor.is_leaf
        return cls(tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.fake_device, *flags)


@dataclass(frozen=True, eq=False)
class Call:
    """What a call returned that may be repeated: the kinds of tensors and plain values, and their structure."""

    results: tuple[Any, ...]
    structure: Any

    def again(self, inputs: Sequence[Tensor], reached: Sequence[int], saved: Sequence[int]) -> Any:
        """What an equal call returns for ``inputs``, those of `inputs_of`.

        In the backward the inputs ``reached`` get gradients; of the inputs and the results those ``saved`` live until
        then. Both are given by their places.
        """
        kinds = [one for one in self.results if isinstance(one, Kind)]
        given = [
            one if place in reached or not one.requires_grad else one.detach() for place, one in enumerate(inputs)
        ]
        made = iter(_Again.apply(kinds, reached, saved, *given))
        results = [next(made) if isinstance(one, Kind) else one for one in self.results]
        return pytree.tree_unflatten(results, self.structure)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kinds: Any, reached: Any, saved: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        made = tuple(torch.empty_strided(k.shape, k.stride, dtype=k.dtype, device=k.device) for k in kinds)
        ctx.mark_non_differentiable(*(one for one, kind in zip(made, kinds, strict=True) if not kind.requires_grad))
        ctx.save_for_backward(*((*inputs, *made)[place] for place in saved))
        ctx.kinds = [Kind.of(one) if place in reached else None for place, one in enumerate(inputs)]
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        made = (kind and torch.empty(kind.shape, dtype=kind.dtype, device=kind.device) for kind in ctx.kinds)
        return None, None, None, *made


def inputs_of(module: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """The tensors in the arguments of a call, and the module's parameters."""
    given = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return *given, *module.parameters()


class Repeats:
    """The calls of a twin's modules so far, by what decides what they do."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, Call] = {}

    def run(self, module: nn.Module, args: Any, kwargs: Any, run: Callable[[], Any]) -> tuple[Any, Call | None]:
        """Twice the call equal to this one; or else what ``run`` returns, and the call if it may be repeated."""
        key = _signature(module, args, kwargs)
        if key is None:
            return run(), None
        if (known := self._calls.get(key)) is not None:
            return known, known
        contents, tensors = Contents(modules=True), inputs_of(module, args, kwargs)

        def state() -> list[Any]:
            parts = list(module.modules())
            held = [[*vars(part), *attributes_of_module(part)] for part in parts]
            held += [list(vars(cls).values()) for cls in {cls for part in parts for cls in _classes(type(part))}]
            return [
                contents.of(held),
                *(None if tensor.is_inference() else version_of(tensor) for tensor in tensors),
                *(id(tensor) for _, tensor in named_tensors(module)),
            ]

        with DisableTorchFunction():
            before = state()
        value = run()
        results, structure = pytree.tree_flatten(value)
        with DisableTorchFunction():
            old = {storage_id(one) for one in (*tensors, *tensors_of(module).values())}
            new = [storage_id(one) for one in results if isinstance(one, Tensor)]
            is_new = len({*new}) == len(new) and old.isdisjoint(new)
            if not is_new or None in before or before != state():
                return value, None
            if not all(isinstance(one, _PLAIN) or _is_whole(one) for one in results):
                return value, None
            kinds = (Kind.of(one) if isinstance(one, FakeTensor) else one for one in results)
            self._calls[key] = Call(tuple(kinds), structure)
        return value, self._calls[key]


def run_equal_once(model: nn.Module, operations: Operations) -> Counter[str]:
    """Have a twin's modules run once where they are equal. Returns the FLOPs of each, by path, once they have run."""
    repeats, flops, inside = Repeats(), Counter[str](), dict[Call, Counter[str]]()
    kinds = {module: (type(module), *(one.shape for one in module.parameters())) for module in model.modules()}
    alike = Counter(kinds.values())

    def wrap(path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        paths = [name for name, _ in module.named_modules()]

        @wraps(forward)
        def once(*args: Any, **kwargs: Any) -> Any:
            start, before = operations.flops, Counter({name: flops[f"{path}.{name}"] for name in paths[1:]})
            if alike[kinds[module]] == 1:
                value, call = forward(*args, **kwargs), None
            else:
                value, call = repeats.run(module, args, kwargs, lambda: forward(*args, **kwargs))
            if isinstance(value, Call):
                inputs, known = inputs_of(module, args, kwargs), inside[value]
                flops.update({f"{path}.{name}": number for name, number in known.items() if name})
                operations.flops += known[""]
                value = value.again(inputs, range(len(inputs)), ())
            elif call is not None:
                inside[call] = Counter({name: flops[f"{path}.{name}"] - before[name] for name in paths[1:]})
                inside[call][""] = operations.flops - start
            flops[path] += operations.flops - start
            return value

        setattr(once, _ONCE, True)
        return once

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) and "forward" not in vars(module):
            vars(module)["forward"] = wrap(path, module, module.forward)
    return flops


_ONCE = "fxcollab_once"


def _classes(cls: type) -> tuple[type, ...]:
    """Those of a module's classes whose attributes a forward may change: not those of torch."""
    return tuple(one for one in cls.__mro__ if one.__module__.partition(".")[0] not in ("torch", "builtins"))


def _is_whole(value: Any) -> bool:
    """Whether it is a fake tensor that takes all of its storage."""
    return type(value) is FakeTensor and value.untyped_storage().nbytes() == value.numel() * value.element_size()


def _signature(module: nn.Module, args: Any, kwargs: Any) -> Hashable | None:
    """What decides what a call does on fake tensors; None where that isn't known."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    if not all(type(leaf) is FakeTensor or isinstance(leaf, _PLAIN) for leaf in leaves):
        return None
    numbers: dict[int, int] = {}  # of modules and storages, in the order in which they are met
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    with DisableTorchFunction():
        return modes, str(structure), tuple(_sign([leaves, module], numbers))


def _sign(value: Any, numbers: dict[int, int]) -> Iterator[Hashable]:
    """All that there is in a value: plain values, kinds of tensors, other objects by identity."""
    if isinstance(value, _PLAIN):
        yield type(value), value
    elif type(value) is FakeTensor:
        yield Kind.of(value), numbers.setdefault(storage_id(value), len(numbers))
        yield from _sign(vars(value), numbers)
    elif type(value) in (list, tuple):
        yield type(value), len(value)
        for one in value:
            yield from _sign(one, numbers)
    elif isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
        yield type(value), numbers.get(id(value))
        if id(value) not in numbers:
            numbers[id(value)] = len(numbers)
            yield from _sign(vars(value), numbers)
    elif type(value) is set and all(isinstance(one, str) for one in value):
        yield set, frozenset(value)
    elif hasattr(value, _ONCE):
        yield _ONCE
    elif isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        yield type(value), tuple(value)
        for one in value.values():
            yield from _sign(one, numbers)
    else:  # another object, such as a configuration, which may have changed since
        yield id(value)
        held = getattr(value, "__dict__", {})
        yield from ((name, one if isinstance(one, _PLAIN) else id(one)) for name, one in list(held.items()))
