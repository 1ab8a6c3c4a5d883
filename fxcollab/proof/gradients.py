"""Check 4: gradients by THE RULE, against separate originals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import TorchDispatchMode, gradient_types, pytree
from fxcollab.errors import CaptureError
from fxcollab.functional import call_with
from fxcollab.plan import plan_of
from fxcollab.proof.lockstep import Lockstep
from fxcollab.proof.report import Check
from fxcollab.proof.runs import (
    Inputs,
    Trial,
    copies,
    fresh,
    state_of_head,
    undisturbed,
    widened,
    with_own_buffers,
    without_dataclasses,
)
from fxcollab.rng import seeded

GRADIENT_TOLERANCE = 1e-8
# Below this share of the largest gradient a parameter's own size is rounding, as of a bias before BatchNorm.
_NOISE_FLOOR = 1e-4
_ROUNDINGS = 16
_DOUBLE = torch.finfo(torch.float64).eps
# What a gradient may differ by, in units of what it changes by where every weight is rounded once more ...
_REROUNDINGS = 8
# ... and of the rounding of the largest gradient.
_LARGEST_ROUNDINGS = 1
_LARGEST_NOISE = 1e-3
# The last: a forward that asks for its precision goes another way in float64.
_RUN_ERRORS = (RuntimeError, TypeError, NotImplementedError, CaptureError)


def check_gradients(trial: Trial) -> Iterator[Check]:
    """With the loss summed over heads: each gradient is the mean (or sum) of those of separate originals.

    In float64; a model that doesn't run so, or not to finite gradients, is compared in its own precision. Where it
    computes in a lower one inside, as behind ``x.half()``, rounding there bounds what can be asked for.
    """
    rescaled = plan_of(trial.train_model).options.rescale
    name = f"gradients are the {'mean' if rescaled else 'sum'} over separate originals"
    with trial.train_model.in_mode(True), undisturbed():
        try:
            comparison, settings = _compared(trial, rescaled)
        except _RUN_ERRORS as error:
            yield Check(name, False, f"the model doesn't run backward: {error}")
            return
        precision = "float64" if settings.double else "the model's own precision"
        worst = max(comparison.differences.values(), default=0.0)
        detail = f"{len(comparison.differences)} tensors in {precision}, largest relative difference {worst:.1e}"
        where = _beyond(comparison, _Noise(trial, rescaled, settings))
    yield Check(name, not where, f"{detail} at {where}" if where else detail)


@dataclass(frozen=True)
class _Settings:
    """How gradients are computed: in float64 or in the model's own precision, of inputs or of parameters alone."""

    double: bool
    inputs: bool


@dataclass(frozen=True)
class _Comparison:
    """Relative differences by tensor; ``epsilon`` is that of the coarsest type that was computed in."""

    differences: Mapping[str, float]
    epsilon: float
    finite: bool

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding may make in any model."""
        return max(GRADIENT_TOLERANCE, _ROUNDINGS * self.epsilon if self.epsilon > _DOUBLE else 0.0)


def _compared(trial: Trial, rescaled: bool) -> tuple[_Comparison, _Settings]:
    """The comparison in the best way in which the model runs."""
    problem: Exception | None = None
    result: tuple[_Comparison, _Settings] | None = None
    for double in (True, False):
        for inputs in (True, False):
            settings = _Settings(double, inputs)
            try:
                result = _compare(trial, rescaled, settings), settings
            except _RUN_ERRORS as error:
                problem = error
                continue
            if result[0].finite:
                return result
    if result is None:
        assert problem is not None
        raise problem
    return result


def _compare(trial: Trial, rescaled: bool, settings: _Settings) -> _Comparison:
    setup = _setup(trial, settings)
    found = _backward(Lockstep(trial.train_model), "model.", setup.leaves, setup.trial, setup.wanted)
    precision = _Precision()
    with precision:
        expected = _expected(setup, rescaled, precision)
    finite = all(bool(gradient.isfinite().all()) for gradient in expected.values())
    return _Comparison(_differences(found, expected), precision.epsilon, finite)


@dataclass(frozen=True)
class _Setup:
    trial: Trial
    leaves: dict[str, Tensor]
    given: dict[str, Tensor]

    @property
    def wanted(self) -> dict[str, Tensor]:
        """The tensors whose gradients are compared, each under its first name."""
        return _unique({**self.leaves, **self.given})


def _setup(trial: Trial, settings: _Settings) -> _Setup:
    leaves = copies(trial.train_model, double=settings.double, gradients=True)
    inputs = _widened(trial.inputs, settings)
    given = {f"input {i}": v for i, v in enumerate(pytree.tree_leaves(inputs)) if isinstance(v, Tensor)}
    return _Setup(replace(trial, inputs=inputs), leaves, given)


def _expected(setup: _Setup, rescaled: bool, precision: _Precision | None = None) -> dict[str, Tensor]:
    """By THE RULE, from one separate original a head."""
    trial, sums, descendants = setup.trial, dict[str, Tensor](), dict[str, int]()
    wanted = setup.wanted
    for head in range(trial.tree.heads):
        state = state_of_head(trial, setup.leaves, head)
        own = {id(tensor) for tensor in state.values()} | {id(value) for value in setup.given.values()}
        mine = {name: tensor for name, tensor in wanted.items() if id(tensor) in own}
        for name, gradient in _backward(trial.model, "", state, trial, mine, precision).items():
            sums[name] = sums[name] + gradient if name in sums else gradient
        for name in mine:
            descendants[name] = descendants.get(name, 0) + 1
    return {name: total / descendants[name] if rescaled else total for name, total in sums.items()}


def _beyond(comparison: _Comparison, noise: _Noise) -> str | None:
    """The tensor whose gradient differs by more than rounding explains."""
    names = {name: size for name, size in comparison.differences.items() if not size <= comparison.tolerance}
    if not names:
        return None
    allowed = noise.sizes(comparison.epsilon)
    beyond = {name: size for name, size in names.items() if not size <= min(allowed.get(name, 0.0), _LARGEST_NOISE)}
    return max(beyond, key=lambda name: beyond[name], default=None)


@dataclass(frozen=True)
class _Noise:
    """How much the originals' own gradients are worth: what one more rounding of all weights does to them."""

    trial: Trial
    rescaled: bool
    settings: _Settings

    def sizes(self, epsilon: float) -> dict[str, float]:
        """The relative difference that may be put down to rounding in a precision, by tensor."""
        setup = _setup(self.trial, self.settings)
        expected = _expected(setup, self.rescaled)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for leaf in _unique(setup.leaves).values():
                signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.device) * 2 - 1
                leaf.mul_(1 + signs * epsilon)
        differences, scales = _differences(_expected(setup, self.rescaled), expected), _scales(expected)
        largest = max(scales.values(), default=0.0)
        return {
            name: _REROUNDINGS * size + _LARGEST_ROUNDINGS * epsilon * largest / scales[name]
            for name, size in differences.items()
        }


class _Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the coarsest floating type on the way of the gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computed = self._on_the_way = 0.0
        self._hidden = False

    @property
    def epsilon(self) -> float:
        """Of all that was computed, where a part of the way can't be seen."""
        return self._computed if self._hidden else self._on_the_way

    def look_at(self, loss: Any) -> None:
        """Follow the way back from a loss: a mask of low precision carries no gradient."""
        waiting = [loss.grad_fn] if isinstance(loss, Tensor) and loss.grad_fn is not None else []
        seen = set(waiting)
        while waiting:
            node: Any = waiting.pop()
            self._hidden |= isinstance(node, torch.autograd.function.BackwardCFunction)
            for dtype in gradient_types(node):
                self._on_the_way = max(self._on_the_way, _epsilon(dtype))
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
    """Relative to each gradient's own size, where that is more than rounding; no gradient is one of zeros."""
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
    prefix: str,
    state: Mapping[str, Tensor],
    trial: Trial,
    wanted: Mapping[str, Tensor],
    precision: _Precision | None = None,
) -> dict[str, Tensor]:
    """Gradients of the loss, summed over heads where there are several.

    The backward runs while the state is in place: checkpointed code is computed again then.
    """
    runner = _Backward(model, trial, wanted, precision)
    own = {f"model.{prefix}{name}": tensor for name, tensor in with_own_buffers(state).items()}
    with seeded(trial.seed):
        gradients: dict[str, Tensor] = call_with(runner, own)
    return gradients


class _Backward(nn.Module):
    def __init__(
        self, model: nn.Module, trial: Trial, wanted: Mapping[str, Tensor], precision: _Precision | None
    ) -> None:
        super().__init__()
        self.model = model
        self._trial, self._wanted, self._precision = trial, wanted, precision

    def forward(self) -> dict[str, Tensor]:
        values = fresh(self._trial.inputs)
        if isinstance(self.model, Lockstep):
            outputs = self.model(*values)
            return _gradients(sum(map(_loss, outputs)), self._wanted)
        args, kwargs = self._trial.interface.call(self.model, values)
        loss = _loss(self.model(*args, **kwargs))
        if self._precision is not None:
            self._precision.look_at(loss)
        return _gradients(loss, self._wanted)


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


def _widened(inputs: Inputs, settings: _Settings) -> tuple[Any, ...]:
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        return widened(value.detach(), settings.double).requires_grad_(settings.inputs)

    return tuple(pytree.tree_map(leaf, list(inputs)))
