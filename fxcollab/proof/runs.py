"""Runs of the original and of the training model, each on copies of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxcollab.codegen.modes import set_mode
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.deep_copy import clone_of, deep_copy, parameter_like
from fxcollab.errors import VerificationError, one_line
from fxcollab.functional import once_each, tensors_of
from fxcollab.plan import plan_of
from fxcollab.proof.attributes import attributes_set
from fxcollab.proof.lockstep import Lockstep, cloned
from fxcollab.rng import seeded
from fxcollab.tracing.interface import Interface
from fxcollab.tree import HeadTree, branch_name

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """Models and inputs to compare on. All runs are on deep copies: forwards write state and set attributes.

    Attributes:
        model: the original.
        train_model: the training model made from it.
        interface: the graph's inputs.
        inputs: a value for each of them.
        seed: for the random operations inside.
        double: whether copies are in double precision.
    """

    model: nn.Module
    train_model: CollabGraphModule
    interface: Interface
    inputs: Sequence[Any]
    seed: int = 0
    double: bool = False

    @property
    def tree(self) -> HeadTree:
        """The head tree."""
        return plan_of(self.train_model).tree

    @property
    def is_own(self) -> bool:
        """Whether the original is what the training model was made from, whose tensors are head 0's."""
        theirs = tensors_of(self.train_model)
        return all(theirs.get(name) is tensor for name, tensor in tensors_of(self.model).items())

    def copied(self) -> Trial:
        """The same with copies of both models, which share what these share."""
        model, train_model = deep_copy((self.model, self.train_model), self._copy)[0]
        self._write_scripted(model, tensors_of(self.model))
        self._write_scripted(train_model, tensors_of(self.train_model))
        copied: Any = type(train_model)  # each has a class of its own
        copied.forward = type(self.train_model).forward  # the very code, not that of the graph as it is now
        return replace(self, model=model, train_model=train_model)

    def trained(self, training: bool) -> CollabGraphModule:
        """A copy of the training model that returns all heads, in train or eval mode."""
        model = self.copied().train_model.train(training)
        model.returns_all = True
        return model

    def original(self, head: int, training: bool, attributes: Set[tuple[str, str]] = frozenset()) -> nn.Module:
        """A copy of the original with a head's state, in train or eval mode.

        Its tensors are copies of this head's. Of ``attributes``, paths in the training model and names, it has the
        values of this head's modules; all others, such as ``eps``, are the original's.
        """
        copied, theirs, keys = once_each(self._copy), tensors_of(self.train_model), self.keys_of(head)
        pairs = [(tensor, theirs[keys[name]]) for name, tensor in tensors_of(self.model).items() if name in keys]
        of_head = {id(tensor): of_its for tensor, of_its in pairs}
        for tensor, of_its in pairs:  # tensors may have others as attributes
            of_head |= {id(held): vars(of_its).get(name, held) for name, held in vars(tensor).items()}
        branches = [
            name for name in self._branches(head) if any(path.startswith(f"{name}.") for path, _ in attributes)
        ]
        peers = (self.train_model.get_submodule(name) for name in branches)
        (model, *owns), *_ = deep_copy((self.model, *peers), lambda tensor: copied(of_head.get(id(tensor), tensor)))
        for branch, own in zip(branches, owns, strict=True):
            for path, name in attributes:
                if path.startswith(f"{branch}."):
                    inner = path.removeprefix(f"{branch}.")
                    mine, theirs_now = vars(model.get_submodule(inner)), vars(own.get_submodule(inner))
                    mine.pop(name, None)
                    mine.update({name: theirs_now[name]} if name in theirs_now else {})
        self._write_scripted(model, {name: theirs[key] for name, key in keys.items()})
        set_mode(model, training)
        return model

    def keys_of(self, head: int) -> dict[str, str]:
        """The original's names of tensors, each with the name that this head's tensor has in the training model."""
        theirs = tensors_of(self.train_model)
        names = {name: name for name in tensors_of(self.model) if name in theirs}
        for branch in self._branches(head):
            names.update({name: f"{branch}.{name}" for name in names if f"{branch}.{name}" in theirs})
        return names

    def _branches(self, head: int) -> list[str]:
        """Paths of the modules that have a head's peers, from the outermost branch inwards."""
        path, peers = self.tree.head_path(head), plan_of(self.train_model).options.peers
        prefixes = [path[:level] for level in range(1, len(path) + 1)]
        known = dict(self.train_model.named_modules(remove_duplicate=False))
        return [name for prefix in prefixes if any(prefix) and (name := f"{peers}.{branch_name(prefix)}") in known]

    def _write_scripted(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Write the state of scripted modules, which make copies of their own tensors whatever is asked."""
        for path, part in model.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                part = part.double() if self.double else part
                for name, tensor in tensors_of(part, f"{path}.").items():
                    tensor.detach().copy_(state[name].detach())

    def _copy(self, tensor: Tensor) -> Tensor:
        wide = widened(tensor.detach(), self.double)
        return clone_of(tensor) if wide.dtype is tensor.dtype else parameter_like(tensor, wide)


@dataclass(frozen=True)
class Run:
    """What a call returned, and what it left.

    Attributes:
        output: what was returned.
        state: parameters and buffers after the call.
        attributes: the attributes of modules that were set, by path and name.
        hazards: writes of one branch into values that another one reads.
        draws: whether the original draws random numbers.
    """

    output: Any
    state: Mapping[str, Tensor]
    attributes: Set[tuple[str, str]] = frozenset()
    hazards: Sequence[str] = ()
    draws: bool = False


def run_train_model(trial: Trial, training: bool, *, together: bool = True) -> Run:
    """Run a copy of the training graph node by node; ``together`` as for `Lockstep`."""
    model = trial.trained(training)
    lockstep = Lockstep(model, together=together)
    with seeded(trial.seed), attributes_set(model) as attributes:
        output = lockstep.run(*cloned(trial.inputs))
    return Run(output, tensors_of(model), attributes, lockstep.hazards, lockstep.draws)


def run(trial: Trial, model: nn.Module) -> Run:
    """Call a copy of the original or of the training model, which it may change."""
    with seeded(trial.seed):
        return Run(call(trial, model, cloned(trial.inputs)), tensors_of(model))


def call(trial: Trial, model: nn.Module, values: Sequence[Any]) -> Any:
    """What ``model`` returns for these values of the graph's inputs."""
    args, kwargs = trial.interface.call(model, values)
    return model(*args, **kwargs)


def attempt(function: Callable[..., T], *args: Any, **kwargs: Any) -> T | str:
    """What ``function`` returns, or, in a line, the error that it raises: the user's code may raise any."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise VerificationError(
                "There is not enough memory for the proof.",
                why=one_line(error),
                hint="give smaller example_inputs (--input), such as a batch of two",
            ) from error
        return one_line(error)


def widened(tensor: Tensor, double: bool) -> Tensor:
    """A floating or complex tensor in double precision if ``double``; others as they are."""
    if double and tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if double and tensor.is_floating_point() else tensor


@contextmanager
def undisturbed() -> Iterator[None]:
    """Outside of the caller's autocast and inference mode, with gradients enabled."""
    with torch.autocast("cpu", enabled=False), torch.inference_mode(False):
        yield
