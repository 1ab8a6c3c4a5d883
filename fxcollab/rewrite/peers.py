"""The peers' state: one instance of everything behind a split for each branch but the all-zeros one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from fxcollab.errors import StateError
from fxcollab.partition.levels import tensors_of
from fxcollab.tree import HeadTree, Path, branch_name


class Branch(nn.Module):
    """Holds the peers of one branch, or a part of them, under the original names."""


@dataclass(frozen=True)
class State:
    """The state of a captured model, as the partition sees it.

    Attributes:
        root: the caller's module.
        modules: level of each module called as one node, by path.
        tensors: level of each parameter and buffer, by every name.
    """

    root: nn.Module
    modules: Mapping[str, int]
    tensors: Mapping[str, int]


def build_peers(state: State, tree: HeadTree) -> dict[Path, Branch]:
    """Peers for every branch of ``tree``, each a copy of the root's own state, not yet initialised.

    A branch shares the tensors of shallower levels with its ancestors; ties inside a branch are kept. A tensor
    is found under every name that it has in the root.

    Raises:
        StateError: a module can't be copied.
    """
    tensors = tensors_of(state.root)
    instances: dict[tuple[int, Path], Tensor] = {}
    branches: dict[Path, Branch] = {}
    for path in tree.peers():
        memo = _shared(state, tensors, path, instances)
        branch = branches[path] = Branch()
        for name in _of_level(state.modules, len(path)):
            _attach(branch, name, _copied(state.root.get_submodule(name), name, memo))
        for name in _of_level(state.tensors, len(path)):
            _attach_tensor(branch, name, instances[id(tensors[name]), path], state.root)
        _set_mode_of_holders(branch, state.root.training)
    return branches


def own_tensors(state: State, path: Path) -> list[str]:
    """Names of the tensors that exist once for each branch of the level of ``path``."""
    return list(_of_level(state.tensors, len(path)))


def _of_level(levels: Mapping[str, int], level: int) -> Iterator[str]:
    return (name for name, own in levels.items() if own == level)


def _shared(
    state: State, tensors: Mapping[str, Tensor], path: Path, instances: dict[tuple[int, Path], Tensor]
) -> dict[int, Any]:
    """The memo of a deep copy for one branch: clones of its own tensors, its ancestors' instances of others."""
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        level = state.tensors[name]
        owner = path[:level]
        if level > len(path) or id(tensor) in memo:
            continue
        if not any(owner):
            memo[id(tensor)] = tensor
        else:
            key = (id(tensor), owner)
            if key not in instances:
                instances[key] = clone_tensor(tensor)
            memo[id(tensor)] = instances[key]
    for module in state.root.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and id(value) not in memo and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # such as old weight_norm's, made anew by its hook
    for name in {"", *_opened(state.modules)}:
        module = state.root.get_submodule(name)
        memo[id(module)] = module  # a child that refers to its parent must not take it along
    return memo


def _copied(module: nn.Module, name: str, memo: dict[int, Any]) -> nn.Module:
    before = dict(memo)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever its parts raise
        raise StateError(
            f"Module {name!r} lies behind a split, and can't be copied for the other heads.",
            where=_uncopyable(module, name, before),
            why=f"{type(error).__name__}: {error}",
            hint="remove the attribute before the transform and set it again afterwards, "
            "or give the module a __deepcopy__",
        ) from error


def _uncopyable(module: nn.Module, name: str, memo: Mapping[int, Any]) -> str:
    """The innermost part of a module that can't be copied, and its attribute where that is why."""
    for path, part in reversed(list(module.named_modules(prefix=name))):
        if not _is_copyable(part, memo):
            held = [key for key, value in part.__dict__.items() if not _is_copyable(value, memo)]
            return f"{path}.{held[0]} ({type(part.__dict__[held[0]]).__name__})" if held else path
    return name


def _is_copyable(value: Any, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # whatever its parts raise
        return False
    return True


def _opened(called: Iterable[str]) -> Iterator[str]:
    """The modules around those that are called, which themselves are not, nor lie in one that is."""
    kept = set(called)
    for name in kept:
        around = list(accumulate(name.split(".")[:-1], "{}.{}".format))
        if kept.isdisjoint(around):
            yield from around


def clone_tensor(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` with storage of its own; works for real, meta and fake ones."""
    values = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        clone: Tensor = nn.Parameter(values, requires_grad=tensor.requires_grad)
    else:
        clone = values
    clone.__dict__.update(tensor.__dict__)
    return clone


def _attach(branch: Branch, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    _container(branch, owner).add_module(leaf, module)


def _attach_tensor(branch: Branch, name: str, tensor: Tensor, root: nn.Module) -> None:
    """Register ``tensor`` at ``name``, unless a cloned module holds it there already."""
    owner, _, leaf = name.rpartition(".")
    holder = _container(branch, owner)
    if not isinstance(holder, Branch):
        return
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(leaf, tensor)
    else:
        transient = leaf in root.get_submodule(owner)._non_persistent_buffers_set
        holder.register_buffer(leaf, tensor, persistent=not transient)


def _container(branch: Branch, path: str) -> nn.Module:
    """The module at ``path`` of a branch, made of empty holders where there is none yet."""
    module: nn.Module = branch
    for atom in path.split(".") if path else ():
        if atom not in module._modules:
            module.add_module(atom, Branch())
        child = module._modules[atom]
        assert child is not None
        module = child
    return module


def _set_mode_of_holders(branch: Branch, training: bool) -> None:
    """The mode of what holds the peers; these themselves have the modes of their originals."""
    for module in branch.modules():
        if isinstance(module, Branch):
            module.training = training


def nest(branches: Mapping[Path, Branch]) -> nn.Module:
    """All branches under one module, each by its name."""
    peers = nn.Module()
    for path, branch in branches.items():
        peers.add_module(branch_name(path), branch)
        peers.training = branch.training
    return peers
