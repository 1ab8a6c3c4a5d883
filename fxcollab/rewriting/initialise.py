"""How peers start. They must differ from head 0, or nothing is learnt from them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import FakeTensor
from fxcollab.deep_copy import clone_of
from fxcollab.errors import StateError, warn_caller
from fxcollab.functional import tensors_of
from fxcollab.rewriting.init_rules import Init, always_copied, is_constant, looks_trained, starts_otherwise
from fxcollab.rewriting.peers import Branch, State
from fxcollab.rng import seeded
from fxcollab.sources.loaded import model_of
from fxcollab.tree import HeadTree, Path, branch_name

Factory = Callable[[], nn.Module]


def initialise(
    branches: Mapping[Path, Branch],
    state: State,
    tree: HeadTree,
    init: Init,
    seed: int,
    factory: Factory | None,
    fresh: Collection[str],
) -> None:
    """Initialise the peers, which are copies of the root's state before; doesn't change the global random state.

    Only ``fresh`` tensors, by their names in the root, differ afterwards, or those that a function chooses. Without a
    factory, which makes a model like the root, modules initialise themselves.
    """
    if not fresh and not callable(init):
        return
    with _unmarked(branches, state):
        if callable(init):
            for path, branch in branches.items():
                with isolated_randomness(seed, branch_name(path)), torch.no_grad():
                    init(branch, branch_name(path))
            _copy_back(branches, state, always_copied(state.root))
            return
        material = {path: branch for path, branch in branches.items() if any(map(_is_known, branch.parameters()))}
        by_factory = factory is not None and bool(material) and _from_factory(material, state, tree, seed, factory)
        if not by_factory:
            _reset_all(material, state, seed, fresh, keeps_zeros=init == "fresh")
        _copy_back(branches, state, set(chain(*state.tensors.values())).difference(fresh))
        _warn_of_training(material, state, fresh, init, by_factory)


def has_different_heads(branches: Mapping[Path, Branch], state: State, depth: int) -> bool:
    """Whether siblings of the deepest level, which share everything before it, differ from the root's parameters.

    Of parameters without values that isn't known, and taken to be so.
    """
    originals = dict(state.root.named_parameters(remove_duplicate=False))

    def differs(own: Mapping[str, Tensor]) -> bool:
        pairs = ((originals[name], peer) for name, peer in own.items() if name in originals)
        return any(not _is_known(own) or not torch.equal(own.detach(), peer.detach()) for own, peer in pairs)

    return all(
        differs(state.own(path, branch)) for path, branch in branches.items() if len(path) == depth and path[-1]
    )


def _copy_back(branches: Mapping[Path, Branch], state: State, names: Container[str]) -> None:
    """Give tensors the values of the root's."""
    originals = tensors_of(state.root)
    with torch.no_grad():
        for path, branch in branches.items():
            for name, tensor in state.own(path, branch).items():
                if name in names:
                    tensor.copy_(originals[name])


def _warn_of_training(
    branches: Mapping[Path, Branch], state: State, fresh: Collection[str], init: Init, by_factory: bool
) -> None:
    """Warn where the given model looks trained, or initialised otherwise than the other heads are."""
    for path, branch in branches.items() if init == "fresh" else ():
        started = {name: tensor for name, tensor in state.own(path, branch).items() if name in fresh}
        if name := looks_trained(started, tensors_of(state.root)):
            warn_caller(
                f"the model looks trained ({name} is no longer what it starts as), and all heads but head 0 start "
                "anew: init='finetune' (--init finetune) lets them start as copies, except for their last layers"
            )
            return
        if not by_factory and (name := starts_otherwise(started, tensors_of(state.root))):
            warn_caller(
                f"all heads but head 0 start by their modules' own reset_parameters, from which the model's {name} "
                "differs: was it initialised by code of its own, or trained? Give a factory, transform(build_model, "
                "...), or factory=build_model, and heads start as that makes them; init='finetune' lets them start "
                "as copies"
            )
            return


_MARK = "_is_hf_initialized"


@contextmanager
def _unmarked(branches: Mapping[Path, Branch], state: State) -> Iterator[None]:
    """Without the mark that keeps the initialisers of transformers from changing what was loaded."""
    originals, removed = set(state.root.modules()), list[tuple[Any, Any]]()
    for path, branch in branches.items():
        copies = (module for module in branch.modules() if module not in originals)
        marked = [one for one in (*state.own(path, branch).values(), *copies) if _MARK in one.__dict__]
        removed.extend((one, one.__dict__.pop(_MARK)) for one in marked)
    try:
        yield
    finally:
        for one, value in removed:
            one.__dict__[_MARK] = value


def _is_known(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _from_factory(branches: Mapping[Path, Branch], state: State, tree: HeadTree, seed: int, factory: Factory) -> bool:
    """Take the values from new models, one a head. Returns False where the factory always makes the same."""
    original = tensors_of(state.root)
    names = {name for path in branches for name in state.tensors[len(path)]}
    parameters = [name for name in names if isinstance(original[name], nn.Parameter)]
    for head in range(1, tree.heads):
        full = tree.head_path(head)
        first = (
            full[:level] for level in range(1, len(full) + 1) if not any(full[level:])
        )  # branches that it begins
        starting = {path: branches[path] for path in first if path in branches}
        if not starting:
            continue
        with isolated_randomness(seed, branch_name(full)):
            made = tensors_of(model_of(factory))
        _check_alike(original, made)
        if parameters and all(torch.equal(original[name].cpu(), made[name].cpu()) for name in parameters):
            warn_caller(
                "the factory makes the same weights at every call (does it set a seed, or load weights?): "
                "peers are initialised by their modules' own reset_parameters instead"
            )
            return False
        with torch.no_grad():
            for path, branch in starting.items():
                for name, tensor in state.own(path, branch).items():
                    tensor.copy_(made[name])
        del made  # before the next one is made
    return True


def _check_alike(original: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    different = [
        name
        for name in original.keys() | made.keys()
        if name not in original or name not in made or original[name].shape != made[name].shape
    ]
    if different:
        raise StateError(
            "The factory makes a model other than the one that is transformed.",
            where=", ".join(sorted(different)[:4]),
            why="these are not the same tensors in both",
            hint="give a factory of exactly this model, or the model alone",
        )


def _reset_all(
    branches: Mapping[Path, Branch], state: State, seed: int, fresh: Collection[str], *, keeps_zeros: bool
) -> None:
    """Every module's own initialisation; one warning names the parameters that no module initialises."""
    originals, library = tensors_of(state.root), _library_initialiser(state.root)
    redrawn: dict[str, None] = {}
    for path, branch in branches.items():
        with isolated_randomness(seed, branch_name(path)):
            likes = {id(t): originals[name] for name, t in state.own(path, branch).items() if name in fresh}
            redrawn |= dict.fromkeys(_reset(branch, likes, library, keeps_zeros))
    if names := [name for name in redrawn if name in fresh]:
        warn_caller(
            f"no module initialises {', '.join(names[:6])}{' and more' if len(names) > 6 else ''}: "
            "redrawn with the mean and deviation they have in the given model, constants kept "
            "(give a factory to initialise them as the model does)"
        )


def _library_initialiser(root: nn.Module) -> Callable[[nn.Module], object] | None:
    """The function by which a model of transformers initialises each of its modules."""
    of_transformers = any(cls.__name__ == "PreTrainedModel" for cls in type(root).__mro__)
    found = getattr(root, "_init_weights", None) if of_transformers else None
    return found if callable(found) else None


def _reset(
    branch: nn.Module, likes: Mapping[int, Tensor], library: Callable[[nn.Module], object] | None, keeps_zeros: bool
) -> list[str]:
    """``reset_parameters`` and the library's initialiser, inner modules first; what neither initialises is redrawn.

    ``likes`` are the originals of the branch's own tensors, by their ids. Returns the parameters that were redrawn.
    """
    redrawn: list[str] = []
    modules = list(branch.named_modules())
    copied = {id(p) for _, part in modules if type(part) is not Branch for p in part.parameters(recurse=False)}
    with (
        torch.no_grad(),
        _copies_of_shared(branch, {id(tensor) for tensor in tensors_of(branch).values()} - likes.keys()),
    ):
        for path, module in reversed(modules):
            prefix = f"{path}." if path else ""
            # a container only has the other names of what a copied module has and initialises
            left = {key: like for key, like in likes.items() if type(module) is not Branch or key not in copied}
            if any(id(tensor) in left for tensor in tensors_of(module).values()):
                redrawn += [prefix + name for name in _reset_module(module, left, library, keeps_zeros)]
    return redrawn


@contextmanager
def _copies_of_shared(branch: nn.Module, foreign: Container[int]) -> Iterator[None]:
    """Replace tensors of shallower levels by copies, while modules initialise everything that they have."""
    registries: list[dict[str, Any]] = [r for m in branch.modules() for r in (m._parameters, m._buffers)]
    replaced = [(registry, key, t) for registry in registries for key, t in registry.items() if id(t) in foreign]
    copies: dict[int, Tensor] = {}
    try:
        for registry, key, tensor in replaced:
            registry[key] = copies.setdefault(id(tensor), clone_of(tensor))
        yield
    finally:
        for registry, key, tensor in replaced:
            registry[key] = tensor


def _reset_module(
    module: nn.Module, likes: Mapping[int, Tensor], library: Callable[[nn.Module], object] | None, keeps_zeros: bool
) -> list[str]:
    """Initialise one module's direct parameters. Returns the names of those that were redrawn."""
    parameters = {name: p for name, p in module.named_parameters(recurse=False) if id(p) in likes}
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    for parameter in parameters.values():
        if parameter.is_floating_point():
            parameter.fill_(float("nan"))  # shows what isn't initialised
    if callable(reset) and _takes_nothing(reset):
        reset()
    if library is not None:
        library(module)
    uninitialised = [
        (name, parameter, likes[id(parameter)])
        for name, parameter in parameters.items()
        if not parameter.is_floating_point() or _is_uninitialised(parameter)
    ]
    for _, parameter, like in uninitialised:
        _redraw(parameter, like)
    zeros = [p for p in parameters.values() if not likes[id(p)].is_meta and not bool(likes[id(p)].any())]
    if keeps_zeros and any(parameter.ndim > 1 for parameter in zeros):  # as of LoRA, whose corrections start at zero
        for parameter in zeros:
            parameter.zero_()
    return [name for name, _, _ in uninitialised]


def _takes_nothing(reset: Callable[..., object]) -> bool:
    """Whether it can be called without arguments."""
    try:
        inspect.signature(reset).bind()
    except (TypeError, ValueError):
        return False
    return True


def _is_uninitialised(parameter: Tensor) -> bool:
    """Whether it was not written since; on meta that isn't known."""
    return not parameter.is_meta and bool(parameter.isnan().any())


def _redraw(parameter: Tensor, like: Tensor) -> None:
    """Normal values with the mean and deviation of ``like``; a constant stays."""
    if not like.is_floating_point() or is_constant(like):
        parameter.copy_(like)
        return
    values = torch.randn(like.shape, dtype=torch.float64)
    values = values * like.double().std().cpu() + like.double().mean().cpu()
    parameter.copy_(values.to(like.dtype))


@contextmanager
def isolated_randomness(seed: int, name: str = "") -> Iterator[None]:
    """Run with generators seeded by ``seed`` and ``name`` alone; restore torch's, numpy's and Python's."""
    derived = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    with seeded(derived):
        yield
