"""A module's tensors by name, calls with others in their place, and modules over the same tensors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxcollab._torch import storage_id
from fxcollab.errors import MixedError
from fxcollab.fx_utils import OWN, has_own

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def call_with(
    module: nn.Module, state: Mapping[str, Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """What ``module``, which isn't changed, returns with ``state`` in the place of its parameters and buffers.

    ``state`` has any of their names; a tensor that is registered in several places is replaced in all of them.
    ``functional_call`` replaces by name, and for a module with two names the second replacement would undo the first
    and leave the wrong tensor behind. So each place is replaced once, by the tensor that is registered there.
    """
    values = {id(tensor): state[name] for name, tensor in named_tensors(module) if name in state}
    places = {name: values[id(tensor)] for name, tensor in _places(module) if id(tensor) in values}
    return functional_call(module, places, tuple(args), dict(kwargs or {}), tie_weights=False)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from nn.Module.named_parameters(module, remove_duplicate=False)  # a wrapper's own method gives other names
    yield from nn.Module.named_buffers(module, remove_duplicate=False)


def parameter_names(module: nn.Module) -> list[str]:
    """The names of its parameters, one for each."""
    return [name for name, _ in nn.Module.named_parameters(module)]


def has_values(module: nn.Module) -> bool:
    """Whether none of its tensors is on meta."""
    return not any(tensor.is_meta for _, tensor in named_tensors(module))


def tensors_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of ``module`` under all their names."""
    return {prefix + name: tensor for name, tensor in named_tensors(module)}


@contextmanager
def restored_on_error(module: nn.Module) -> Iterator[None]:
    """On an error, put back the tensors that are registered in a module, their values, and its extra state."""
    registries: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (each, dict(each)) for part in module.modules() for each in (part._parameters, part._buffers)
    ]
    extra = [
        (part, copy.deepcopy(part.get_extra_state()))
        for part in module.modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    ]
    tensors = {id(tensor): tensor for _, tensor in named_tensors(module) if not hasattr(tensor, "device_mesh")}
    before = [(tensor, tensor.data) for tensor in tensors.values()]  # of sharded ones, torch's own loaders take care
    stored = {storage_id(data): _bytes_of(data) for _, data in before if not data.is_meta and _has_storage(data)}
    values = {key: each.clone() for key, each in stored.items()}
    others = [(data, data.clone()) for _, data in before if not _has_storage(data)]
    try:
        yield
    except BaseException:
        for registry, entries in registries:
            registry.clear()
            registry.update(entries)
        for tensor, data in before:
            tensor.data = data
        for key, each in stored.items():
            each.copy_(values[key])
        for each, value in others:
            each.copy_(value)
        for part, state in extra:
            part.set_extra_state(state)
        raise


def _has_storage(tensor: Tensor) -> bool:
    """Whether its values lie in one piece of memory; those of sparse ones, and of wrappers of others, don't."""
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:  # of which NotImplementedError is one
        return False
    return True


def bits_of(tensor: Tensor) -> Tensor:
    """The values of a dense tensor as integers, which are equal where all bits are."""
    resolved = tensor.detach().resolve_conj().resolve_neg()  # lazily conjugated tensors have other bytes
    return resolved.contiguous().flatten().view(_INTEGERS.get(resolved.element_size(), torch.int64))


def refuse_mixed(module: nn.Module, written: Mapping[str, Any]) -> None:
    """Raise where two names are one tensor, or share memory, and were given values of their own.

    Args:
        module: in which every tensor may be of another type than the one that was written into it.
        written: by names of its tensors.

    Raises:
        MixedError: with the names.
    """
    found = {name: tensor for name, tensor in named_tensors(module) if name in written and _has_storage(tensor)}
    uses = Counter(storage_id(tensor) for tensor in found.values() if tensor.numel() and not tensor.is_meta)
    shared = (name for name, tensor in found.items() if uses[storage_id(tensor)] > 1)
    wrong = [name for name in shared if not _holds(found[name], written[name])]
    if wrong:
        raise MixedError(
            f"{type(module).__name__} does not hold the values that were loaded.",
            where=f"{', '.join(wrong[:4])}{' and more' if len(wrong) > 4 else ''}",
            why="several names are one tensor there, and have values of their own in what is loaded",
            hint="give a model that ties its tensors as the other does; it is as it was before",
        )


def _holds(found: Tensor, value: Tensor) -> bool:
    """Whether a dense tensor has another's values, in its own type."""
    plain, other = (each.detach().as_subclass(Tensor) for each in (found, value))
    if plain.is_quantized or plain.shape != other.shape:
        return True  # whose modules load in their own way
    return torch.equal(bits_of(plain), bits_of(other.to(plain)))


def _bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def shallow(module: nn.Module) -> nn.Module:
    """A module of the same class with registries of its own over the same entries."""
    if isinstance(module, fx.GraphModule):
        new = nn.Module()
        new.__class__ = type(type(module).__name__, (nn.Module,), {})
        kept = {k: v for k, v in module.__dict__.items() if isinstance(v, Tensor)}
        new.__dict__.update(kept, training=module.training)
        new._modules, new._parameters, new._buffers = module._modules, module._parameters, module._buffers
    else:
        new = module.__class__.__new__(module.__class__)
        new.__dict__.update(module.__dict__)
    for registry in ("_modules", "_parameters", "_buffers"):
        new.__dict__[registry] = dict(module.__dict__[registry])
    new.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return new


def without(module: nn.Module, dropped: Collection[str]) -> nn.Module:
    """A copy of ``module`` without some of its tensors, which shares all others."""
    if not dropped:
        return module
    new = shallow(module)
    for name in dropped:
        for registry in (new._parameters, new._buffers):
            registry.pop(name, None)
    for child, part in module._modules.items():
        below = {name.removeprefix(f"{child}.") for name in dropped if name.startswith(f"{child}.")}
        if below and part is not None:
            new._modules[child] = without(part, below)
    return new


def once_each(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function``, called once for each tensor; later calls return the same result."""
    known: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor, whose id must not be used again

    def found(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor, function(tensor)
        return known[id(tensor)][1]

    return found


def _places(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Where tensors are registered, once each; in a graph module by a path that its class doesn't hide."""
    graphs = [f"{path}." if path else "" for path, part in module.named_modules() if has_own(part)]
    for path, part in module.named_modules():
        found = (*part.named_parameters("", False, False), *part.named_buffers("", False, False))
        for name, tensor in found:
            place = f"{path}.{name}" if path else name
            for prefix in sorted(graphs, key=len, reverse=True):
                if place.startswith(prefix):
                    place = f"{prefix}{OWN}.{place.removeprefix(prefix)}"
            yield place, tensor
