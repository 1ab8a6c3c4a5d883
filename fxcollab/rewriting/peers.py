"""The peers' state: one instance of everything behind a split for each branch but the all-zeros one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fxcollab.deep_copy import deep_copy_into, is_copyable
from fxcollab.errors import StateError
from fxcollab.functional import tensors_of
from fxcollab.fx_utils import opened_around
from fxcollab.tree import HeadTree, Path, branch_name


class Branch(nn.Module):
    """A container of the peers of one branch, or a part of them, under the original names."""


@dataclass(frozen=True, eq=False)
class State:
    """The caller's module, with the levels of modules called as one node, and of tensors by every name."""

    root: nn.Module
    modules: Mapping[str, int]
    tensors: Mapping[str, int]

    def modules_of(self, level: int) -> Sequence[str]:
        """Paths of the modules that exist once for each branch of a level."""
        return self._modules_by_level.get(level, ())

    def tensors_of(self, level: int) -> Sequence[str]:
        """Names of the tensors that exist once for each branch of a level."""
        return self._tensors_by_level.get(level, ())

    @cached_property
    def _modules_by_level(self) -> dict[int, list[str]]:
        return _by_level(self.modules)

    @cached_property
    def _tensors_by_level(self) -> dict[int, list[str]]:
        return _by_level(self.tensors)


def _by_level(levels: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, level in levels.items():
        found.setdefault(level, []).append(name)
    return found


def build_peers(state: State, tree: HeadTree) -> dict[Path, Branch]:
    """Peers for every branch of ``tree``, each a copy of the root's own state, not yet initialised.

    A branch shares the tensors of shallower levels with its ancestors; ties inside a branch are kept. A tensor
    is found under every name that it has in the root.

    Raises:
        StateError: a module can't be copied.
    """
    tensors = tensors_of(state.root)
    # A module that refers to one around it must not copy that one.
    around = (state.root.get_submodule(name) for name in {"", *opened_around(state.modules)})
    kept = {id(module): module for module in around}
    instances: dict[Path, Mapping[int, Any]] = {(): _originals(state, tensors, 0) | kept}
    branches: dict[Path, Branch] = {}
    for level in range(1, tree.depth + 1):
        originals = _originals(state, tensors, level)
        for path in tree.paths(level):
            instances[path] = originals if not any(path) else {key: clone_tensor(t) for key, t in originals.items()}
            if any(path):
                ancestry = [instances[path[:shallow]] for shallow in range(level, -1, -1)]
                branches[path] = _build(state, tensors, path, ancestry)
    return branches


def _build(state: State, tensors: Mapping[str, Tensor], path: Path, ancestry: Sequence[Mapping[int, Any]]) -> Branch:
    """The peers of one branch: its own instances of tensors come first in ``ancestry``, then those around it."""
    branch = Branch()
    modules = {name: state.root.get_submodule(name) for name in state.modules_of(len(path))}
    memo = Memo(ancestry)
    for name, module in modules.items():
        owner, _, leaf = name.rpartition(".")
        _container(branch, owner).add_module(leaf, _copied(module, name, memo))
    for name in state.tensors_of(len(path)):
        _attach_tensor(branch, name, ancestry[0][id(tensors[name])], state.root)
    for part in branch.modules():
        if isinstance(part, Branch):  # copied modules have the modes of their originals
            part.training = state.root.training
    return branch


def _originals(state: State, tensors: Mapping[str, Tensor], level: int) -> dict[int, Any]:
    return {id(tensors[name]): tensors[name] for name in state.tensors_of(level)}


class Memo(dict[int, Any]):
    """The memo of a deep copy, which also has the instances that the branches around have of an object.

    They are looked up one after the other, since merged they would be the whole model in every branch.
    """

    def __init__(self, ancestry: Sequence[Mapping[int, Any]]) -> None:
        super().__init__()
        self._ancestry = ancestry

    def fresh(self) -> Memo:
        """A memo without copies."""
        return Memo(self._ancestry)

    def __missing__(self, key: int) -> Any:
        for instances in self._ancestry:
            if key in instances:
                return instances[key]
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or any(key in instances for instances in self._ancestry)

    def get(self, key: int, default: Any = None) -> Any:
        """The copy, or the instance in a branch around."""
        try:
            return self[key]
        except KeyError:
            return default


def _copied(module: nn.Module, name: str, memo: Memo) -> nn.Module:
    try:
        return deep_copy_into(memo, module, clone_tensor, all_functions=False)[0]
    except Exception as error:  # whatever its parts raise
        raise StateError(
            f"Module {name!r} lies behind a split, and can't be copied for the other heads.",
            where=_uncopyable(module, name, memo),
            why=f"{type(error).__name__}: {error}",
            hint="remove the attribute before the transform and set it again afterwards, "
            "or give the module a __deepcopy__",
        ) from error


def _uncopyable(module: nn.Module, name: str, memo: Memo) -> str:
    """The innermost part of a module that can't be copied, and its attribute where that is why."""
    for path, part in reversed(list(module.named_modules(prefix=name))):
        if not is_copyable(part, memo.fresh()):
            names = [key for key, value in part.__dict__.items() if not is_copyable(value, memo.fresh())]
            return f"{path}.{names[0]} ({type(part.__dict__[names[0]]).__name__})" if names else path
    return name


def clone_tensor(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` with storage of its own; works for real, meta and fake ones."""
    values = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        clone: Tensor = nn.Parameter(values, requires_grad=tensor.requires_grad)
    else:
        clone = values
    clone.__dict__.update(tensor.__dict__)
    return clone


def _attach_tensor(branch: Branch, name: str, tensor: Tensor, root: nn.Module) -> None:
    """Register ``tensor`` at ``name``, unless a copied module has it there already."""
    owner, _, leaf = name.rpartition(".")
    container = _container(branch, owner)
    if not isinstance(container, Branch):
        return
    if isinstance(tensor, nn.Parameter):
        container.register_parameter(leaf, tensor)
    else:
        transient = leaf in root.get_submodule(owner)._non_persistent_buffers_set
        container.register_buffer(leaf, tensor, persistent=not transient)


def _container(branch: Branch, path: str) -> nn.Module:
    """The module at ``path`` of a branch, made where there is none yet."""
    module: nn.Module = branch
    for atom in path.split(".") if path else ():
        if atom not in module._modules:
            module.add_module(atom, Branch())
        child = module._modules[atom]
        assert child is not None
        module = child
    return module


def nest(branches: Mapping[Path, Branch]) -> nn.Module:
    """All branches under one module, each by its name."""
    peers = nn.Module()
    for path, branch in branches.items():
        peers.add_module(branch_name(path), branch)
        peers.training = branch.training
    return peers
