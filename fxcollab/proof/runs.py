"""Runs of the original and of the training model on copies of their state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import pytree
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.functional import call_with, copied_state, once_each
from fxcollab.plan import plan_of
from fxcollab.proof.lockstep import Lockstep, cloned
from fxcollab.rewriting.state_dict import prune_names
from fxcollab.rng import seeded
from fxcollab.tracing.interface import Interface
from fxcollab.tree import HeadTree


@dataclass(frozen=True)
class Trial:
    """Models and inputs to compare on. All runs are on copies of the state.

    Attributes:
        model: the original.
        train_model: the training model made from it.
        interface: the graph's inputs.
        inputs: a value for each of them.
        seed: for the random operations inside.
    """

    model: nn.Module
    train_model: CollabGraphModule
    interface: Interface
    inputs: Sequence[Any]
    seed: int = 0

    @property
    def tree(self) -> HeadTree:
        """The head tree."""
        return plan_of(self.train_model).tree


@dataclass(frozen=True)
class Run:
    """What a call returned, and the state that it left."""

    output: Any
    state: Mapping[str, Tensor]


def run_train_model(trial: Trial, state: Mapping[str, Tensor], *, together: bool = True) -> Run:
    """Run the training graph node by node on ``state``; ``together`` as for `Lockstep`."""
    model, own = Lockstep(trial.train_model, together=together), with_own_buffers(state)
    prefixed = {f"model.{name}": tensor for name, tensor in own.items()}
    with seeded(trial.seed):
        return Run(call_with(model, prefixed, cloned(trial.inputs)), own)


def run_original(trial: Trial, state: Mapping[str, Tensor]) -> Run:
    """Call the original on ``state``."""
    own = with_own_buffers(state)
    with seeded(trial.seed):
        return Run(call(trial, trial.model, own), own)


def call(trial: Trial, model: nn.Module, state: Mapping[str, Tensor]) -> Any:
    """What ``model`` returns for the trial's inputs with ``state`` in the place of its own."""
    args, kwargs = trial.interface.call(model, cloned(trial.inputs))
    return call_with(model, state, args, kwargs)


def with_own_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state for one run, with copies of what it may write into, such as statistics and counters."""
    own = once_each(lambda tensor: tensor if tensor.requires_grad else _like(tensor, tensor.clone()))
    return {name: own(tensor) for name, tensor in state.items()}


def copies(train_model: CollabGraphModule, *, double: bool = False, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of all state under all names; a tensor with several names has one copy."""

    def copy(tensor: Tensor) -> Tensor:
        own = _like(tensor, widened(tensor.detach().clone(), double))
        return own.requires_grad_(gradients and tensor.requires_grad)

    return copied_state(train_model, copy)


def _like(tensor: Tensor, copy: Tensor) -> Tensor:
    """The copy of a parameter as a parameter: forwards may look at the type."""
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def widened(tensor: Tensor, double: bool) -> Tensor:
    """A floating or complex tensor in double precision if ``double``; others as they are."""
    if double and tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if double and tensor.is_floating_point() else tensor


def state_of_head(trial: Trial, state: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """The part of the training model's ``state`` that is the original's as this head, by the original's names."""
    keys = prune_names(state, head, peers=plan_of(trial.train_model).options.peers)
    return {name: state[key] for name, key in keys.items()}


def without_dataclasses(output: Any) -> Any:
    """The output with dataclasses, which are leaves to pytree, as dicts of their fields."""

    def fields(value: Any) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type | dict):
            return value
        named = {field.name: without_dataclasses(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {type(value).__qualname__: named}

    return pytree.tree_map(fields, output)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Outside of the caller's autocast and inference mode, with gradients enabled."""
    with torch.autocast("cpu", enabled=False), torch.inference_mode(False):
        yield
