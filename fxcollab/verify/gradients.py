"""Check 4: gradients by THE RULE, against separate originals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxcollab.plan import plan_of
from fxcollab.verify.lockstep import Lockstep
from fxcollab.verify.report import Check
from fxcollab.verify.runs import (
    Inputs,
    Trial,
    copies,
    fresh,
    opened,
    seeded,
    state_of_head,
    undisturbed,
    widened,
    with_own_buffers,
)

GRADIENT_TOLERANCE = 1e-8
# Below this share of the largest gradient a parameter's own size is rounding, as of a bias before BatchNorm.
_NOISE_FLOOR = 1e-4
_ROUNDINGS = 16
_DOUBLE = torch.finfo(torch.float64).eps


def check_gradients(trial: Trial) -> Iterator[Check]:
    """With the loss summed over heads: each gradient is the mean (or sum) of those of separate originals.

    In float64; a model that doesn't run so is compared in its own precision. Where it computes in a lower one
    inside, as behind ``x.half()``, rounding there bounds what can be asked for.
    """
    rescaled = plan_of(trial.train_model).rescale
    name = f"gradients are the {'mean' if rescaled else 'sum'} over separate originals"
    with trial.train_model.in_mode(True), undisturbed():
        try:
            found, where = _worst_gradient(trial, rescaled, double=True), "float64"
        except (RuntimeError, TypeError, NotImplementedError):
            try:
                found, where = _worst_gradient(trial, rescaled, double=False), "the model's own precision"
            except (RuntimeError, TypeError, NotImplementedError) as error:
                yield Check(name, False, f"the model doesn't run backward: {error}")
                return
    ok = found.worst <= found.tolerance
    detail = f"{found.count} tensors in {where}, largest relative difference {found.worst:.1e}"
    yield Check(name, ok, detail if ok else f"{detail} at {found.where}")


@dataclass(frozen=True)
class _Comparison:
    worst: float
    where: str
    count: int
    tolerance: float


def _worst_gradient(trial: Trial, rescaled: bool, *, double: bool) -> _Comparison:
    leaves = copies(trial.train_model, double=double, gradients=True)
    inputs = _differentiable(trial.inputs, double)
    trial = replace(trial, inputs=inputs)
    given = {f"input {i}": v for i, v in enumerate(pytree.tree_leaves(inputs)) if isinstance(v, Tensor)}
    wanted = _unique({**leaves, **given})
    found = _backward(Lockstep(trial.train_model), "model.", leaves, trial, wanted)
    sums: dict[str, Tensor] = {}
    descendants: dict[str, int] = {}
    precision = _Precision()
    for head in range(trial.tree.heads):
        state = state_of_head(trial, leaves, head)
        own = {id(tensor) for tensor in state.values()} | {id(value) for value in given.values()}
        mine = {name: tensor for name, tensor in wanted.items() if id(tensor) in own}
        with precision:
            alone = _backward(trial.model, "", state, trial, mine)
        for name, gradient in alone.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
        for name in mine:
            descendants[name] = descendants.get(name, 0) + 1
    expected = {name: total / descendants[name] if rescaled else total for name, total in sums.items()}
    return _Comparison(*_largest_difference(found, expected), precision.tolerance)


class _Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the coarsest floating type that is computed in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._epsilon = 0.0

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding may make."""
        return max(GRADIENT_TOLERANCE, _ROUNDINGS * self._epsilon if self._epsilon > _DOUBLE else 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in _tensors(result):
            if leaf.is_floating_point() or leaf.is_complex():
                self._epsilon = max(self._epsilon, torch.finfo(leaf.dtype).eps)
        return result


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


def _backward(
    model: nn.Module, prefix: str, state: Mapping[str, Tensor], trial: Trial, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of the loss, summed over heads where there are several.

    The backward runs while the state is in place: checkpointed code is computed again then.
    """
    runner = _Backward(model, trial, wanted)
    own = {f"model.{prefix}{name}": tensor for name, tensor in with_own_buffers(state).items()}
    with seeded(trial.seed):
        gradients: dict[str, Tensor] = functional_call(runner, own, ())
    return gradients


class _Backward(nn.Module):
    def __init__(self, model: nn.Module, trial: Trial, wanted: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._trial, self._wanted = trial, wanted

    def forward(self) -> dict[str, Tensor]:
        values = fresh(self._trial.inputs)
        if isinstance(self.model, Lockstep):
            outputs = self.model(*values)
            return _gradients(sum(map(_loss, outputs)), self._wanted)
        args, kwargs = self._trial.interface.call(self.model, values)
        return _gradients(_loss(self.model(*args, **kwargs)), self._wanted)


def _gradients(loss: Any, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return {}
    loss.backward()  # type: ignore[no-untyped-call]  # not autograd.grad, which reentrant checkpointing refuses
    gradients = {name: leaf.grad for name, leaf in wanted.items() if leaf.grad is not None}
    for leaf in wanted.values():
        leaf.grad = None
    return gradients


def _loss(output: Any) -> Any:
    """A fixed random projection of all floating outputs, the same for every head."""
    generator = torch.Generator().manual_seed(1)
    total: Any = 0
    for leaf in _tensors(output):
        if leaf.is_floating_point() or leaf.is_complex():
            weights = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
            total = total + (leaf.real * weights).sum() if leaf.is_complex() else total + (leaf * weights).sum()
    return total


def _tensors(output: Any) -> Iterable[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(opened(output)) if isinstance(leaf, Tensor))


def _unique(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    by_identity = {id(tensor): (name, tensor) for name, tensor in reversed(list(tensors.items()))}
    return dict(pair for pair in by_identity.values() if pair[1].requires_grad)


def _differentiable(inputs: Inputs, double: bool) -> tuple[Any, ...]:
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        return widened(value.detach(), double).requires_grad_()

    return tuple(pytree.tree_map(leaf, list(inputs)))
