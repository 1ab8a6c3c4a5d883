"""The peers' state: one instance of everything behind a split for each branch but the all-zeros one."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import storage_id
from fxcollab.deep_copy import Memo, clone_of, copy_attributes, deep_copy_into, uncopyable
from fxcollab.errors import StateError
from fxcollab.functional import tensors_of
from fxcollab.fx_utils import opened_around
from fxcollab.rewriting.state_dict import NAMES, record_names
from fxcollab.tree import HeadTree, Path, branch_name, parse_branch_name


class Branch(nn.Module):
    """A container of the peers of one branch, or a part of them, under the original names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(record_names)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class State:
    """The caller's module; by level, the paths of modules that are called as one node, and all names of tensors."""

    root: nn.Module
    modules: Mapping[int, Sequence[str]]
    tensors: Mapping[int, Sequence[str]]

    @classmethod
    def of(cls, root: nn.Module, modules: Mapping[str, int], tensors: Mapping[str, int]) -> State:
        """From the level of every name."""
        by_level: list[dict[int, list[str]]] = [defaultdict(list), defaultdict(list)]
        for found, levels in zip(by_level, (modules, tensors), strict=True):
            for name, level in levels.items():
                found[level].append(name)
        return cls(root, *by_level)

    def own(self, path: Path, branch: nn.Module) -> dict[str, Tensor]:
        """The tensors that only this branch has, by their names in the root."""
        tensors = tensors_of(branch)
        return {name: tensors[name] for name in self.tensors[len(path)] if name in tensors}


def build_peers(state: State, tree: HeadTree) -> dict[Path, Branch]:
    """Peers for every branch of ``tree``, each a copy of the root's own state, not yet initialised.

    A branch shares the tensors of shallower levels with its ancestors; ties inside a branch are kept. A tensor
    is found under every name that it has in the root.

    Raises:
        StateError: a module can't be copied, or two parameters share memory.
    """
    tensors = tensors_of(state.root)
    # A module that refers to one around it must not copy that one.
    around = (state.root.get_submodule(name) for name in {"", *opened_around(chain(*state.modules.values()))})
    kept = {id(module): module for module in around}
    instances: dict[Path, ChainMap[int, Any]] = {(): ChainMap(_originals(state, tensors, 0) | kept)}
    branches: dict[Path, Branch] = {}
    _refuse_shared_memory(state, tensors)
    for level in range(1, tree.depth + 1):
        originals = _originals(state, tensors, level)
        for path in tree.paths(level):
            own = {key: clone_of(tensor) for key, tensor in originals.items()} if any(path) else originals
            # one after the other: merged they would be the whole model in every branch
            instances[path] = instances[path[:-1]].new_child(own)
            if any(path):
                branches[path] = _build(state, tensors, path, instances[path])
    return branches


def _build(state: State, tensors: Mapping[str, Tensor], path: Path, instances: ChainMap[int, Any]) -> Branch:
    """The peers of one branch; ``instances`` are its own of the tensors, and those of the branches around it."""
    branch = Branch()
    names = state.modules[len(path)]
    memo = Memo(instances)
    for name, module in zip(names, _copied(state.root, names, memo), strict=True):
        owner, _, leaf = name.rpartition(".")
        _container(branch, owner).add_module(leaf, module)
    for name in state.tensors[len(path)]:
        copy_attributes(tensors[name], instances[id(tensors[name])], memo)
        _attach_tensor(branch, name, instances[id(tensors[name])], state.root)
    for part in branch.modules():
        if isinstance(part, Branch):  # copied modules have the modes of their originals
            part.training = state.root.training
    return branch


def _originals(state: State, tensors: Mapping[str, Tensor], level: int) -> dict[int, Any]:
    return {id(tensors[name]): tensors[name] for name in state.tensors[level]}


def _copied(root: nn.Module, names: Sequence[str], memo: Memo) -> tuple[nn.Module, ...]:
    modules = tuple(root.get_submodule(name) for name in names)
    try:
        return deep_copy_into(memo, modules, clone_of, share_functions=True)[0]
    except Exception as error:  # whatever its parts raise
        inside = (pair for name in names for pair in root.get_submodule(name).named_modules(prefix=name))
        where, part = next(iter(uncopyable(inside, memo).items()), (names[0], modules[0]))
        name = next(name for name in names if f"{where}.".startswith(f"{name}."))
        raise StateError(
            f"Module {name!r} lies behind a split, and can't be copied for the other heads.",
            where=where if isinstance(part, nn.Module) else f"{where} ({type(part).__name__})",
            why=f"{type(error).__name__}: {error}",
            hint="remove the attribute before the transform and set it again afterwards, "
            "or give the module a __deepcopy__",
        ) from error


def _refuse_shared_memory(state: State, tensors: Mapping[str, Tensor]) -> None:
    """Raise for a parameter behind a split that lies in another tensor's memory without being that: copies don't."""
    found: dict[int, list[tuple[tuple[int, int], str]]] = defaultdict(list)
    level_of = {name: level for level, names in state.tensors.items() for name in names}
    first_names = {id(tensor): name for name, tensor in reversed([*tensors.items()]) if name in level_of}
    for name in first_names.values():
        if tensors[name].layout is torch.strided and tensors[name].numel():
            found[storage_id(tensors[name])].append((_bytes_of(tensors[name]), name))
    for group in found.values():
        before: list[tuple[int, str]] = []  # those that reach into what follows
        for (start, end), name in sorted(group):
            before = [(last, other) for last, other in before if last > start]
            for _, other in before:
                trained = tensors[name].requires_grad or tensors[other].requires_grad
                if trained and level_of[name] + level_of[other] and _overlap(tensors[name], tensors[other]):
                    raise StateError(
                        f"{other!r} and {name!r} are two tensors in the same memory.",
                        where=f"{other} and {name}, of which one is behind a split",
                        why="those of the other heads would not share theirs, so that heads differ in what they are",
                        hint=f"make them one parameter, as in module.weight = other.weight, or "
                        f"clone one: weight = model.get_parameter({name!r}); weight.data = weight.data.clone()",
                    )
            before.append((end, name))


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor lies in: the first, and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return start * size, (start + int(last) + 1) * size


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors over one storage have a byte in common."""
    start, end = min(_bytes_of(one)[0], _bytes_of(other)[0]), max(_bytes_of(one)[1], _bytes_of(other)[1])
    taken = torch.zeros(end - start, dtype=torch.uint8)

    def of(tensor: Tensor) -> Tensor:
        size = tensor.element_size()
        shape = [length if stride else 1 for length, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        strides = [stride * size for stride in tensor.stride()]
        return taken.as_strided((*shape, size), (*strides, 1), _bytes_of(tensor)[0] - start)

    of(one).fill_(1)
    return bool(of(other).any())


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
        vars(branch)[NAMES] = tuple(branch.state_dict())  # no child can have a dot in its name
        peers.add_module(branch_name(path), branch)
        peers.training = branch.training
    return peers


def kept_peers(peers: nn.Module, kept: Collection[Path]) -> nn.Module:
    """The peers of the kept branches."""
    new = nn.Module()
    new.training = peers.training
    for name, child in peers.named_children():
        path = parse_branch_name(name)
        if path is None:
            new.add_module(name, kept_peers(child, kept))
        elif path in kept:
            new.add_module(name, child)
    return new
