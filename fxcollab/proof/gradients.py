"""Check 4: gradients follow the mean-gradient rule (equation 6), against separate originals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import TorchDispatchMode, gradient_types, pytree
from fxcollab.errors import CaptureError
from fxcollab.functional import call_with
from fxcollab.plan import plan_of
from fxcollab.proof.lockstep import Lockstep, cloned
from fxcollab.proof.report import Check
from fxcollab.proof.runs import (
    Trial,
    copies,
    state_of_head,
    undisturbed,
    widened,
    with_own_buffers,
    without_dataclasses,
)
from fxcollab.rng import seeded

GRADIENT_TOLERANCE = 1e-8
# A gradient below this share of the largest may be all rounding, such as that of a bias before BatchNorm.
_NOISE_FLOOR = 1e-4
_ROUNDINGS = 16
_DOUBLE = torch.finfo(torch.float64).eps
# What a gradient may differ by, in units of its change where every weight is rounded once more ...
_REROUNDINGS = 8
# ... and of the rounding of the largest gradient.
_LARGEST_ROUNDINGS = 1
_LARGEST_NOISE = 1e-3
# The last: a forward that looks at its precision takes a different branch in float64.
_RUN_ERRORS = (RuntimeError, TypeError, NotImplementedError, CaptureError)


def check_gradients(trial: Trial) -> Iterator[Check]:
    """With the loss summed over heads: each gradient is the mean (or sum) of those of separate originals.

    In float64; a model that doesn't run so, or not to finite gradients, is compared in its own precision. Where it
    computes in a lower one inside, as behind ``x.half()``, the tolerance is that precision's.
    """
    rescaled = plan_of(trial.train_model).options.rescale
    name = f"gradients are the {'mean' if rescaled else 'sum'} over separate originals"
    with trial.train_model.in_mode(True), undisturbed():
        try:
            comparison = _best_comparison(trial)
        except _RUN_ERRORS as error:
            yield Check(name, False, f"the model doesn't run backward: {error}")
            return
        precision = "float64" if comparison.setup.double else "the model's own precision"
        worst = max(comparison.differences.values(), default=0.0)
        detail = f"{len(comparison.differences)} tensors in {precision}, largest relative difference {worst:.1e}"
        where = _beyond_rounding(comparison)
    yield Check(name, not where, f"{detail} at {where}" if where else detail)


@dataclass(frozen=True)
class _Setup:
    """Copies of the inputs (in the trial) and of the state, in float64 or in the model's own precision.

    Attributes:
        leaves: the training model's parameters and buffers under all their names.
        wanted: the tensors whose gradients are compared, each under its first name.
    """

    trial: Trial
    double: bool
    leaves: dict[str, Tensor]
    wanted: dict[str, Tensor]


@dataclass(frozen=True)
class _Comparison:
    """Relative differences by tensor; ``epsilon`` is that of the coarsest type that was computed in."""

    setup: _Setup
    expected: dict[str, Tensor]
    differences: dict[str, float]
    epsilon: float


def _best_comparison(trial: Trial) -> _Comparison:
    """In float64 where the model runs so, and of the inputs' gradients too where it has them."""
    problem: Exception | None = None
    result: _Comparison | None = None
    for double, of_inputs in product((True, False), repeat=2):
        try:
            result = _compare(_setup(trial, double, of_inputs))
        except _RUN_ERRORS as error:
            problem = error
            continue
        if all(bool(gradient.isfinite().all()) for gradient in result.expected.values()):
            return result
    if result is None:
        assert problem is not None
        raise problem
    return result


def _setup(trial: Trial, double: bool, of_inputs: bool) -> _Setup:
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        return widened(value.detach(), double).requires_grad_(of_inputs)

    leaves = copies(trial.train_model, double=double, gradients=True)
    inputs = tuple(pytree.tree_map(leaf, list(trial.inputs)))
    given = {f"input {i}": v for i, v in enumerate(pytree.tree_leaves(inputs)) if isinstance(v, Tensor)}
    return _Setup(replace(trial, inputs=inputs), double, leaves, _unique({**leaves, **given}))


def _compare(setup: _Setup) -> _Comparison:
    found = _backward(Lockstep(setup.trial.train_model), setup.leaves, setup.trial, setup.wanted)
    expected, epsilon = _expected(setup)
    return _Comparison(setup, expected, _differences(found, expected), epsilon)


def _expected(setup: _Setup) -> tuple[dict[str, Tensor], float]:
    """Gradients by the mean-gradient rule from one separate original per head, and the epsilon of their precision."""
    trial, sums, heads = setup.trial, dict[str, Tensor](), Counter[str]()
    with _Precision() as precision:
        for head in range(trial.tree.heads):
            state = state_of_head(trial, setup.leaves, head)
            own = {id(tensor) for tensor in state.values()}
            mine = {name: t for name, t in setup.wanted.items() if id(t) in own or name not in setup.leaves}
            for name, gradient in _backward(trial.model, state, trial, mine, precision.look_at).items():
                sums[name] = sums[name] + gradient if name in sums else gradient
            heads.update(mine.keys())
        if plan_of(trial.train_model).options.rescale:
            sums = {name: total / heads[name] for name, total in sums.items()}
    return sums, precision.epsilon


def _beyond_rounding(comparison: _Comparison) -> str | None:
    """The tensor whose gradient differs most, of those that differ by more than rounding explains."""
    epsilon = comparison.epsilon
    tolerance = max(GRADIENT_TOLERANCE, _ROUNDINGS * epsilon if epsilon > _DOUBLE else 0.0)
    beyond = {name: size for name, size in comparison.differences.items() if not size <= tolerance}
    if beyond:
        noise = _noise(comparison)
        beyond = {name: size for name, size in beyond.items() if not size <= noise.get(name, 0.0)}
    return max(beyond, key=lambda name: beyond[name], default=None)


def _noise(comparison: _Comparison) -> dict[str, float]:
    """The relative difference that rounding explains, by tensor: what one more rounding of all weights changes.

    It writes into the leaves of the comparison.
    """
    setup, expected, epsilon = comparison.setup, comparison.expected, comparison.epsilon
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in _unique(setup.leaves).values():
            signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.device) * 2 - 1
            leaf.mul_(1 + signs * epsilon)
    changes, scales = _differences(_expected(setup)[0], expected), _scales(expected)
    largest = max(scales.values(), default=0.0)
    sizes = {
        name: _REROUNDINGS * size + _LARGEST_ROUNDINGS * epsilon * largest / scales[name]
        for name, size in changes.items()
    }
    return {name: min(size, _LARGEST_NOISE) for name, size in sizes.items()}


class _Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the coarsest floating type that gradients flow through."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computed = self._differentiated = 0.0
        self._hidden = False

    @property
    def epsilon(self) -> float:
        """Of all that was computed, where a custom autograd function hides a part of the backward graph."""
        return self._computed if self._hidden else self._differentiated

    def look_at(self, loss: Any) -> None:
        """Walk a loss's backward graph: a mask of low precision isn't in it."""
        waiting = [loss.grad_fn] if isinstance(loss, Tensor) and loss.grad_fn is not None else []
        seen = set(waiting)
        while waiting:
            node: Any = waiting.pop()
            self._hidden |= isinstance(node, torch.autograd.function.BackwardCFunction)
            for dtype in gradient_types(node):
                self._differentiated = max(self._differentiated, _epsilon(dtype))
            following = {source for source, _ in node.next_functions if source is not None} - seen
            seen |= following
            waiting += following

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in _tensor_leaves(result):
            self._computed = max(self._computed, _epsilon(leaf.dtype))
        return result


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative to each gradient's own size, where that is more than rounding; no gradient counts as zeros."""
    absent = {name: torch.zeros_like(gradient) for name, gradient in found.items() if name not in expected}
    expected = {**expected, **absent}
    scales = _scales(expected)
    return {
        name: float((found[name] - gradient if name in found else gradient).abs().max()) / scales[name]
        for name, gradient in expected.items()
        if gradient.numel()
    }


def _scales(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    sizes = {name: float(gradient.abs().max()) for name, gradient in gradients.items() if gradient.numel()}
    largest = max(sizes.values(), default=0.0)
    return {name: max(size, _NOISE_FLOOR * largest) or 1.0 for name, size in sizes.items()}


def _backward(
    model: nn.Module,
    state: Mapping[str, Tensor],
    trial: Trial,
    wanted: Mapping[str, Tensor],
    look_at: Callable[[Any], None] = lambda loss: None,
) -> dict[str, Tensor]:
    """Gradients of the loss, which ``look_at`` sees before the backward; of a `Lockstep`, summed over heads."""
    prefix = "model.model." if isinstance(model, Lockstep) else "model."
    own = {f"{prefix}{name}": tensor for name, tensor in with_own_buffers(state).items()}
    with seeded(trial.seed):
        gradients: dict[str, Tensor] = call_with(_Backward(model, trial, wanted, look_at), own)
    return gradients


class _Backward(nn.Module):
    """Runs the backward inside a call, while the state is in place: checkpointed code is computed again then."""

    def __init__(
        self, model: nn.Module, trial: Trial, wanted: Mapping[str, Tensor], look_at: Callable[[Any], None]
    ) -> None:
        super().__init__()
        self.model = model
        self._trial, self._wanted, self._look_at = trial, wanted, look_at

    def forward(self) -> dict[str, Tensor]:
        values = cloned(self._trial.inputs)
        if isinstance(self.model, Lockstep):
            loss: Any = sum(map(_loss, self.model(*values)))
        else:
            args, kwargs = self._trial.interface.call(self.model, values)
            loss = _loss(self.model(*args, **kwargs))
        self._look_at(loss)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return {}
        loss.backward()  # type: ignore[no-untyped-call]  # reentrant checkpointing doesn't support autograd.grad
        gradients = {name: leaf.grad for name, leaf in self._wanted.items() if leaf.grad is not None}
        for leaf in self._wanted.values():
            leaf.grad = None
        return gradients


def _loss(output: Any) -> Any:
    """A fixed random projection of all floating outputs, the same for every head."""
    generator = torch.Generator().manual_seed(1)
    total: Any = 0
    for leaf in _tensor_leaves(output):
        if leaf.is_floating_point() or leaf.is_complex():
            weights = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
            total = total + (leaf.real * weights).sum() if leaf.is_complex() else total + (leaf * weights).sum()
    return total


def _tensor_leaves(output: Any) -> Iterable[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(without_dataclasses(output)) if isinstance(leaf, Tensor))


def _unique(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    by_identity = {id(tensor): (name, tensor) for name, tensor in reversed(list(tensors.items()))}
    return dict(pair for pair in by_identity.values() if pair[1].requires_grad)
