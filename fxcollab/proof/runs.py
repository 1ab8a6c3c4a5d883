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
from fxcollab.proof.lockstep import Lockstep
from fxcollab.rewriting.state_dict import prune_names
from fxcollab.rng import seeded
from fxcollab.tracing.interface import Interface
from fxcollab.tree import HeadTree

Inputs = Sequence[Any]


@dataclass(frozen=True)
class Trial:
    """Models and inputs to compare on. Neither model's state is touched: all runs are on copies.

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
    inputs: Inputs
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
    """Run the training graph node by node on ``state``; ``together``: heads draw the same random numbers."""
    model, own = Lockstep(trial.train_model, together=together), with_own_buffers(state)
    prefixed = {f"model.{name}": tensor for name, tensor in own.items()}
    with seeded(trial.seed):
        return Run(call_with(model, prefixed, fresh(trial.inputs)), own)


def run_original(trial: Trial, state: Mapping[str, Tensor]) -> Run:
    """Call the original on ``state``."""
    own = with_own_buffers(state)
    with seeded(trial.seed):
        return Run(call(trial, trial.model, own), own)


def call(trial: Trial, model: nn.Module, state: Mapping[str, Tensor]) -> Any:
    """What ``model`` returns for the trial's inputs with ``state`` in the place of its own."""
    args, kwargs = trial.interface.call(model, fresh(trial.inputs))
    return call_with(model, state, args, kwargs)


def fresh(inputs: Inputs) -> tuple[Any, ...]:
    """The inputs for one run, which may write into them; gradients reach the given ones."""
    return tuple(pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, list(inputs)))


def with_own_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a run may write into is its own: statistics, counters, the vectors of a spectral norm."""
    own = once_each(lambda tensor: tensor if tensor.requires_grad else _like(tensor, tensor.clone()))
    return {name: own(tensor) for name, tensor in state.items()}


def copies(train_model: CollabGraphModule, *, double: bool = False, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of all state under all names; tensors that were one stay one."""

    def copy(tensor: Tensor) -> Tensor:
        own = _like(tensor, widened(tensor.detach().clone(), double))
        return own.requires_grad_(gradients and tensor.requires_grad)

    return copied_state(train_model, copy)


def _like(tensor: Tensor, copy: Tensor) -> Tensor:
    """A copy of a parameter is a parameter: forwards may ask."""
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def widened(tensor: Tensor, double: bool) -> Tensor:
    """In double precision, if asked for and a floating tensor."""
    if not double:
        return tensor
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def state_of_head(trial: Trial, state: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """What the original needs to be this head, by its own names."""
    keys = prune_names(state, head, peers=plan_of(trial.train_model).options.peers)
    return {name: state[key] for name, key in keys.items()}


def without_dataclasses(output: Any) -> Any:
    """The output with its dataclasses, into which pytree doesn't look, as named fields."""

    def fields(value: Any) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type | dict):
            return value
        named = {field.name: without_dataclasses(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {type(value).__qualname__: named}

    return pytree.tree_map(fields, output)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Out of any autocast or inference mode of the caller's; gradients are enabled."""
    with torch.autocast("cpu", enabled=False), torch.inference_mode(False):
        yield
