"""Checks 3 and 4: outputs bit for bit, and gradients by THE RULE against separate originals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxcollab.codegen import CollabGraphModule
from fxcollab.plan import plan_of
from fxcollab.state_dict import prune_names
from fxcollab.tree import HeadTree
from fxcollab.verify.lockstep import GeneratorState, Lockstep
from fxcollab.verify.report import Check

Inputs = Sequence[Any]
GRADIENT_TOLERANCE = 1e-8
# Below this share of the largest gradient a parameter's own size is rounding, as of a bias before BatchNorm.
_NOISE_FLOOR = 1e-4


@dataclass(frozen=True)
class Trial:
    """Models and inputs to compare on. Neither model's state is touched: all runs are on copies.

    Attributes:
        model: the original.
        train_model: the training model made from it.
        inputs: positional inputs of a call.
        seed: for the random operations inside.
    """

    model: nn.Module
    train_model: CollabGraphModule
    inputs: Inputs
    seed: int = 0

    @property
    def tree(self) -> HeadTree:
        """The head tree."""
        return plan_of(self.train_model).tree


def check_outputs(trial: Trial) -> Iterator[Check]:
    """Every head against the original that holds this head's weights, in both modes."""
    for training in (True, False):
        mode = "train" if training else "eval"
        with trial.train_model.in_mode(training), torch.no_grad(), _undisturbed():
            outputs = _run_train_model(trial, _copies(trial.train_model))
            for head in range(trial.tree.heads):
                states = _copies(trial.train_model)
                expected = _run_original(trial, _state_of_head(trial, states, head))
                difference = _bits_differ(outputs[head], expected)
                what = "the original" if head == 0 else f"the original with head {head}'s weights"
                yield Check(
                    f"head {head} in {mode} mode equals {what}",
                    difference is None,
                    difference or "bit for bit",
                )
            if not training:
                yield _check_generated_code(trial, outputs)


def _check_generated_code(trial: Trial, outputs: Any) -> Check:
    with _seeded(trial.seed):
        generated = functional_call(trial.train_model, _copies(trial.train_model), tuple(trial.inputs))
    difference = _bits_differ(generated, outputs)
    return Check("the generated forward runs the graph", difference is None, difference or "bit for bit")


def check_gradients(trial: Trial) -> Iterator[Check]:
    """With the loss summed over heads: each gradient is the mean (or sum) of those of separate originals."""
    rescaled = plan_of(trial.train_model).rescale
    name = f"gradients are the {'mean' if rescaled else 'sum'} over separate originals, in float64"
    try:
        with trial.train_model.in_mode(True), _undisturbed():
            worst, where, count = _worst_gradient(trial, rescaled)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        yield Check(name, False, f"the model doesn't run in float64: {error}")
        return
    detail = f"{count} tensors, largest relative difference {worst:.1e}"
    yield Check(name, worst <= GRADIENT_TOLERANCE, f"{detail}{'' if worst <= GRADIENT_TOLERANCE else f' at {where}'}")


def _worst_gradient(trial: Trial, rescaled: bool) -> tuple[float, str, int]:
    leaves = _copies(trial.train_model, torch.float64, gradients=True)
    inputs = [_double(value) for value in trial.inputs]
    double = Trial(trial.model, trial.train_model, inputs, trial.seed)
    wanted = _unique({**leaves, **{f"input {i}": v for i, v in enumerate(inputs) if isinstance(v, Tensor)}})
    outputs = _run_train_model(double, leaves)
    found = _gradients(sum(_loss(outputs[head]) for head in range(trial.tree.heads)), wanted)
    del outputs
    sums: dict[str, Tensor] = {}
    descendants: dict[str, int] = {}
    for head in range(trial.tree.heads):
        state = _state_of_head(double, leaves, head)
        own = {id(tensor) for tensor in state.values()} | {id(value) for value in inputs}
        mine = {name: tensor for name, tensor in wanted.items() if id(tensor) in own}
        for name, gradient in _gradients(_loss(_run_original(double, state)), mine).items():
            sums[name] = sums[name] + gradient if name in sums else gradient
        for name in mine:
            descendants[name] = descendants.get(name, 0) + 1
    expected = {name: total / descendants[name] if rescaled else total for name, total in sums.items()}
    return _largest_difference(found, expected)


def _largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str, int]:
    largest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    worst, where = 0.0, ""
    for name in found.keys() | expected.keys():
        one, other = found.get(name), expected.get(name)
        if one is None or other is None:
            present = one if other is None else other
            assert present is not None
            one, other = (torch.zeros_like(present) if g is None else g for g in (one, other))
        if not one.numel():
            continue
        scale = max(float(other.abs().max()), _NOISE_FLOOR * largest) or 1.0
        difference = float((one - other).abs().max()) / scale
        if not difference <= worst:
            worst, where = difference, name
    return worst, where, len(expected)


def _gradients(loss: Any, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return {}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, gradients, strict=True) if g is not None}


def _loss(output: Any) -> Any:
    """A fixed random projection of all floating outputs, the same for every head."""
    generator = torch.Generator().manual_seed(1)
    total: Any = 0
    for leaf in _tensors(output):
        if leaf.is_floating_point() or leaf.is_complex():
            weights = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
            total = total + (leaf.real * weights).sum() if leaf.is_complex() else total + (leaf * weights).sum()
    return total


def _unique(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    by_identity = {id(tensor): (name, tensor) for name, tensor in reversed(list(tensors.items()))}
    return dict(pair for pair in by_identity.values() if pair[1].requires_grad)


def _run_train_model(trial: Trial, state: Mapping[str, Tensor]) -> Any:
    prefixed = {f"model.{name}": tensor for name, tensor in state.items()}
    with _seeded(trial.seed):
        return functional_call(Lockstep(trial.train_model), prefixed, tuple(trial.inputs))


def _run_original(trial: Trial, state: Mapping[str, Tensor]) -> Any:
    with _seeded(trial.seed):
        return functional_call(trial.model, dict(state), tuple(trial.inputs))


def _copies(
    train_model: CollabGraphModule, dtype: torch.dtype | None = None, *, gradients: bool = False
) -> dict[str, Tensor]:
    """Copies of all state under all names; tensors that were one stay one."""
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for kind in (train_model.named_parameters, train_model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            if id(tensor) not in copies:
                copy = tensor.detach().clone()
                copy = copy.to(dtype) if dtype and copy.is_floating_point() else copy
                differentiable = copy.is_floating_point() or copy.is_complex()
                copies[id(tensor)] = copy.requires_grad_(gradients and tensor.requires_grad and differentiable)
            state[name] = copies[id(tensor)]
    return state


def _state_of_head(trial: Trial, state: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """What the original needs to be this head, by its own names."""
    keys = prune_names(state, head, peers=plan_of(trial.train_model).peers)
    return {name: state[key] for name, key in keys.items()}


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_()
    return value


def _bits_differ(one: Any, other: Any) -> str | None:
    """How two output structures differ, in words; None where they are equal bit for bit."""
    left, right = pytree.tree_flatten(one), pytree.tree_flatten(other)
    if type(one) is not type(other) or left[1] != right[1]:
        return f"{type(one).__qualname__} and {type(other).__qualname__} have different structures"
    for index, (a, b) in enumerate(zip(left[0], right[0], strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a != b:
                return f"output {index}: {a} and {b}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(_bytes(a), _bytes(b)):
            return f"output {index} differs by up to {float((a - b).abs().max()):.1e}"
    return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _tensors(output: Any) -> Iterable[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    before = GeneratorState()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Out of any autocast or inference mode of the caller's."""
    with torch.autocast("cpu", enabled=False), torch.inference_mode(False):
        yield
