"""How peers start. They must differ from head 0, or nothing is learnt from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxcollab._torch import FakeTensor
from fxcollab.errors import PatternError, StateError, warn_caller
from fxcollab.functional import tensors_of
from fxcollab.rewriting.peers import Branch, State, clone_tensor
from fxcollab.rng import seeded
from fxcollab.tree import HeadTree, Path, branch_name

Factory = Callable[[], nn.Module]
InitFunction = Callable[[nn.Module, str], None]
Init = Literal["fresh", "copy", "copy-anyway"] | InitFunction
INITS = ("fresh", "copy", "copy-anyway")


def check_init(init: Init | str, stochastic: bool) -> None:
    """Refuse an unknown ``init``, and ``copy`` where heads that start equal would stay equal.

    Args:
        init: the way peers start.
        stochastic: whether anything behind a split draws random numbers.

    Raises:
        PatternError: with the way out.
    """
    if callable(init):
        return
    if init not in INITS:
        raise PatternError(
            f"There is no init {init!r}.", hint=f"use one of {', '.join(INITS)}, or a callable(module, path)"
        )
    if init == "copy" and not stochastic:
        raise PatternError(
            "Peers that start as copies would never differ from head 0.",
            why="no operation behind the splits draws random numbers, so all heads would stay equal",
            hint="use init='fresh' (--init fresh), or 'copy-anyway' if you make them differ yourself",
        )


def initialise(
    branches: Mapping[Path, Branch],
    state: State,
    tree: HeadTree,
    init: Init | str,
    seed: int,
    factory: Factory | None,
) -> None:
    """Give the peers their first values; leaves the global random state as it was.

    Args:
        branches: the peers, at present copies of the root's state.
        state: levels of the root's state.
        tree: the head tree.
        init: ``fresh``, ``copy``, ``copy-anyway``, or a function of a branch's module and its name.
        seed: what ``fresh`` and functions draw from.
        factory: makes a model like the root; where it is None, modules initialise themselves.
    """
    if isinstance(init, str) and init.startswith("copy"):
        return
    with _unmarked(branches, state):
        if callable(init):
            for path, branch in branches.items():
                with isolated_randomness(seed, branch_name(path)), torch.no_grad():
                    init(branch, branch_name(path))
            return
        material = {path: branch for path, branch in branches.items() if _has_values(branch)}
        if not (material and factory is not None and _from_factory(material, state, tree, seed, factory)):
            _reset_all(material, state, seed)


_MARK = "_is_hf_initialized"


@contextmanager
def _unmarked(branches: Mapping[Path, Branch], state: State) -> Iterator[None]:
    """Without the mark by which transformers knows what it has loaded, which its initialisers leave as it is."""
    originals, taken = set(state.root.modules()), list[tuple[Any, Any]]()
    for path, branch in branches.items():
        tensors = tensors_of(branch)
        own = (tensors[name] for name in state.tensors_of(len(path)))
        copies = (module for module in branch.modules() if module not in originals)
        marked = [held for held in (*own, *copies) if _MARK in held.__dict__]
        taken.extend((held, held.__dict__.pop(_MARK)) for held in marked)
    try:
        yield
    finally:
        for held, value in taken:
            held.__dict__[_MARK] = value


def _has_values(branch: nn.Module) -> bool:
    return any(t.device.type != "meta" and not isinstance(t, FakeTensor) for t in branch.parameters())


def _from_factory(branches: Mapping[Path, Branch], state: State, tree: HeadTree, seed: int, factory: Factory) -> bool:
    """Take the values from new models, one a head. Returns False where the factory always makes the same."""
    original = tensors_of(state.root)
    names = {name for path in branches for name in state.tensors_of(len(path))}
    for head in range(1, tree.heads):
        full = tree.head_path(head)
        born = {path: branches[path] for path in _firsts(full) if path in branches}
        if born and not _filled(born, state, original, names, factory, seed, full):
            warn_caller(
                "the factory makes the same weights at every call (does it set a seed, or load weights?): "
                "peers are initialised by their modules' own reset_parameters instead"
            )
            return False
    return True


def _firsts(full: Path) -> Iterator[Path]:
    """The branches whose first head it is."""
    return (full[:level] for level in range(1, len(full) + 1) if not any(full[level:]))


def _filled(
    born: Mapping[Path, Branch],
    state: State,
    original: Mapping[str, Tensor],
    names: Iterable[str],
    factory: Factory,
    seed: int,
    full: Path,
) -> bool:
    """Fill branches from a new model, which is let go of before the next one is made; False where it isn't new."""
    with isolated_randomness(seed, branch_name(full)):
        made = tensors_of(factory())
    _check_alike(original, made)
    if _equal(names, original, made):
        return False
    for path, branch in born.items():
        peers = tensors_of(branch)
        with torch.no_grad():
            for name in state.tensors_of(len(path)):
                peers[name].copy_(made[name])
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


def _equal(names: Iterable[str], original: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> bool:
    parameters = [name for name in names if isinstance(original[name], nn.Parameter)]
    return bool(parameters) and all(
        torch.equal(original[name].detach().cpu(), made[name].detach().cpu()) for name in parameters
    )


def _reset_all(branches: Mapping[Path, Branch], state: State, seed: int) -> None:
    """Every module's own initialisation; one warning names what had to be redrawn."""
    originals, library = tensors_of(state.root), _library_initialiser(state.root)
    redrawn: dict[str, None] = {}
    for path, branch in branches.items():
        with isolated_randomness(seed, branch_name(path)):
            own = {name: originals[name] for name in state.tensors_of(len(path))}
            redrawn |= dict.fromkeys(_reset(branch, own, library))
    if redrawn:
        names = list(redrawn)
        warn_caller(
            f"no module initialises {', '.join(names[:6])}{' and more' if len(names) > 6 else ''}: "
            "redrawn with the mean and deviation they have in the given model, constants kept "
            "(give a factory to initialise them as the model does)"
        )


def _library_initialiser(root: nn.Module) -> Callable[[nn.Module], object] | None:
    """What a library's models do to each of their modules at first: transformers' have it."""
    of_transformers = any(cls.__name__ == "PreTrainedModel" for cls in type(root).__mro__)
    found = getattr(root, "_init_weights", None) if of_transformers else None
    return found if callable(found) else None


def _reset(branch: nn.Module, own: Mapping[str, Tensor], library: Callable[[nn.Module], object] | None) -> list[str]:
    """``reset_parameters`` and the library's initialiser, inner modules first; what they leave out is redrawn.

    Args:
        branch: the peers.
        own: for each of the branch's own tensors, the original of the same name.
        library: initialises one module, after its own ``reset_parameters``.

    Returns:
        The names of parameters that were redrawn.
    """
    tensors = tensors_of(branch)
    likes = {id(tensors[name]): original for name, original in own.items()}
    redrawn: list[str] = []
    with torch.no_grad(), _standing_in(branch, {id(tensor) for tensor in tensors.values()} - likes.keys()):
        for path, module in reversed(list(branch.named_modules())):
            prefix = f"{path}." if path else ""
            redrawn += [prefix + name for name in _reset_module(module, likes, library)]
    return redrawn


@contextmanager
def _standing_in(branch: nn.Module, foreign: Container[int]) -> Iterator[None]:
    """Copies for tensors that belong to shallower levels, while modules initialise all that they hold."""
    registries: list[dict[str, Any]] = [r for m in branch.modules() for r in (m._parameters, m._buffers)]
    held = [(registry, key, t) for registry in registries for key, t in registry.items() if id(t) in foreign]
    copies: dict[int, Tensor] = {}
    try:
        for registry, key, tensor in held:
            registry[key] = copies.setdefault(id(tensor), clone_tensor(tensor))
        yield
    finally:
        for registry, key, tensor in held:
            registry[key] = tensor


def _reset_module(
    module: nn.Module, likes: Mapping[int, Tensor], library: Callable[[nn.Module], object] | None
) -> list[str]:
    """Initialise one module's direct parameters. Returns the names of those that had to be redrawn."""
    parameters = {name: p for name, p in module.named_parameters(recurse=False) if id(p) in likes}
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    for parameter in parameters.values():
        if parameter.is_floating_point():
            parameter.fill_(float("nan"))  # to see what is covered
    if callable(reset):
        reset()
    if library is not None:
        library(module)
    uncovered = [
        (name, parameter, likes[id(parameter)])
        for name, parameter in parameters.items()
        if not parameter.is_floating_point() or _uncovered(parameter)
    ]
    for _, parameter, like in uncovered:
        _redraw(parameter, like)
    return [name for name, _, _ in uncovered]


def _uncovered(parameter: Tensor) -> bool:
    """Whether nothing has written to it since; on meta there is nothing to see."""
    return not parameter.is_meta and bool(parameter.isnan().any())


def _redraw(parameter: Tensor, like: Tensor) -> None:
    """Normal values with the mean and deviation of ``like``; a constant stays."""
    if like.numel() < 2 or not like.is_floating_point() or bool((like == like.flatten()[0]).all()):
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
