"""Check 5: gradients follow the mean-gradient rule (equation 6), against separate originals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxcollab._torch import TorchDispatchMode, gradient_types, pytree
from fxcollab.contents import tensors_in
from fxcollab.functional import tensors_of
from fxcollab.plan import plan_of
from fxcollab.proof.attributes import Attributes, attributes_set
from fxcollab.proof.lockstep import Lockstep, cloned
from fxcollab.proof.report import Check
from fxcollab.proof.runs import Trial, attempt, call, undisturbed, widened
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


def check_gradients(trial: Trial) -> Check:
    """With the loss summed over heads: each gradient is the mean (or sum) of those of separate originals.

    In float64; a model that doesn't run so, or not to finite gradients, is compared in its own precision. Where it
    computes in a lower one inside, as behind ``x.half()``, the tolerance is that precision's.
    """
    rescaled = plan_of(trial.train_model).options.rescale
    name = f"gradients are the {'mean' if rescaled else 'sum'} over separate originals"
    with undisturbed(), torch.enable_grad():
        comparison = _best_comparison(trial)
        if isinstance(comparison, _Problem):
            if comparison.of_original:
                return Check.not_made(name, f"the original itself raises {comparison.error}")
            return Check(name, False, f"the training model raises {comparison.error}")
        if comparison.infinite and not comparison.differences:
            return Check.not_made(name, "the original's own gradients are NaN or infinite")
        precision = "float64" if comparison.setup.trial.double else "the model's own precision"
        worst = max(comparison.differences.values(), default=0.0)
        detail = f"{len(comparison.differences)} tensors in {precision}, largest relative difference {worst:.1e}"
        if comparison.infinite:
            detail += f"; not {len(comparison.infinite)} for which the original's own are NaN or infinite"
        where = _beyond_rounding(comparison)
    return Check(name, not where, f"{detail} at {where}" if where else detail)


@dataclass(frozen=True)
class _Setup:
    """What is compared.

    Attributes:
        trial: in float64 or in the model's own precision, with inputs that may require gradients.
        wanted: first names of the training model's tensors that require gradients, by the tensors' identity.
        inputs: those that require gradients, by names that say so.
    """

    trial: Trial
    wanted: Mapping[int, str]
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Problem:
    """The error of a run, and whether the original raises it too."""

    error: str
    of_original: bool


@dataclass(frozen=True)
class _Comparison:
    """Relative differences by tensor, and the tensors for which the original's own gradients are not finite.

    ``epsilon`` is that of the coarsest type that was computed in, ``attributes`` are those that a call sets.
    """

    setup: _Setup
    attributes: Attributes
    expected: Mapping[str, Tensor]
    infinite: frozenset[str]
    differences: dict[str, float]
    epsilon: float


def _best_comparison(trial: Trial) -> _Comparison | _Problem:
    """In float64 where the model runs so, and of the inputs' gradients too where it has them."""
    best: _Comparison | _Problem | None = None
    for double, of_inputs in product((True, False), repeat=2):
        result = _compare(_setup(trial, double, of_inputs))
        if isinstance(result, _Comparison) or not isinstance(best, _Comparison):
            best = result
        if isinstance(result, _Comparison) and not result.infinite:
            break
    assert best is not None
    return best


def _setup(trial: Trial, double: bool, of_inputs: bool) -> _Setup:
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        return widened(value.detach(), double).requires_grad_(of_inputs)

    inputs = tuple(pytree.tree_map(leaf, list(trial.inputs)))
    given = [(i, value) for i, value in enumerate(pytree.tree_leaves(inputs)) if isinstance(value, Tensor)]
    named = reversed(tensors_of(trial.train_model).items())
    return _Setup(
        replace(trial, inputs=inputs, double=double),
        {id(tensor): name for name, tensor in named if tensor.requires_grad},
        {f"input {i}": value for i, value in given if value.requires_grad},
    )


def _compare(setup: _Setup) -> _Comparison | _Problem:
    found = attempt(_found, setup)
    expected = attempt(_expected, setup, Attributes() if isinstance(found, str) else found.attributes)
    if isinstance(expected, str):
        return _Problem(expected, of_original=True)
    if isinstance(found, str):
        return _Problem(found, of_original=False)
    gradients, epsilon = expected
    infinite = frozenset(name for name, gradient in gradients.items() if not largest(gradient) < torch.inf)
    finite = {name: gradient for name, gradient in gradients.items() if name not in infinite}
    compared = {name: gradient for name, gradient in found.gradients.items() if name not in infinite}
    differences = _differences(compared, finite)
    by_code, by_graph = (
        {name: gradient for name, gradient in one.items() if name not in infinite}
        for one in (found.generated, found.same)
    )
    for name, size in _differences(by_code, by_graph).items():
        differences[name] = max(size, differences.get(name, 0.0))
    return _Comparison(setup, found.attributes, finite, infinite, differences, epsilon)


class _Found(NamedTuple):
    """Gradients of the training model.

    Attributes:
        gradients: where all heads draw the numbers that the original draws.
        attributes: those that a call sets.
        generated: by the generated forward, where one head draws after the other.
        same: by the graph, where they draw so.
    """

    gradients: dict[str, Tensor]
    attributes: Attributes
    generated: dict[str, Tensor]
    same: dict[str, Tensor]


def _found(setup: _Setup) -> _Found:
    trial, model = setup.trial, setup.trial.trained(True)
    lockstep = Lockstep(model)
    with attributes_set(model) as attributes:
        gradients = backward(trial, lockstep.run, _wanted(setup, model))
    model = trial.trained(True)
    generated = backward(trial, lambda *values: call(trial, model, values), _wanted(setup, model))
    same = gradients
    if lockstep.draws:
        model = trial.trained(True)
        same = backward(trial, Lockstep(model, together=False).run, _wanted(setup, model))
    return _Found(gradients, attributes, generated, same)


def _wanted(setup: _Setup, model: nn.Module) -> dict[str, Tensor]:
    tensors = tensors_of(model)
    return {**{name: tensors[name] for name in setup.wanted.values()}, **setup.inputs}


def _expected(setup: _Setup, attributes: Attributes) -> tuple[dict[str, Tensor], float]:
    """Gradients by the mean-gradient rule from one separate original per head, and the epsilon of their precision."""
    trial, sums, heads, precision = setup.trial, dict[str, Tensor](), Counter[str](), _Precision()
    theirs = tensors_of(trial.train_model)
    for head in range(trial.tree.heads):
        model = trial.original(head, True, attributes)
        tensors, keys = tensors_of(model), trial.keys_of(head)
        ids = {name: id(theirs[key]) for name, key in keys.items()}
        mine = {setup.wanted[ids[name]]: tensors[name] for name in reversed(keys) if ids[name] in setup.wanted}
        mine.update(setup.inputs)
        with nullcontext() if head else precision:  # all heads compute in the same types
            gradients = backward(trial, partial(_head_alone, trial, model), mine, precision.look_at)
        for name, gradient in gradients.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
        heads.update(mine.keys())
    if plan_of(trial.train_model).options.rescale:
        sums = {name: total / heads[name] for name, total in sums.items()}
    return sums, precision.epsilon


def _head_alone(trial: Trial, model: nn.Module, *values: Any) -> tuple[Any]:
    return (call(trial, model, values),)


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
    """The relative difference that rounding explains, by tensor: what one more rounding of all weights changes."""
    setup, expected, epsilon = comparison.setup, comparison.expected, comparison.epsilon
    generator, rounded = torch.Generator().manual_seed(0), setup.trial.copied()
    wanted = dict[int, str]()
    tensors = tensors_of(rounded.train_model)
    with torch.no_grad():
        for name in setup.wanted.values():
            signs = torch.randint(0, 2, tensors[name].shape, generator=generator).to(tensors[name].device) * 2 - 1
            tensors[name].mul_(1 + signs * epsilon)
            wanted[id(tensors[name])] = name
    again, _ = _expected(_Setup(rounded, wanted, setup.inputs), comparison.attributes)
    changes = _differences({name: again[name] for name in expected}, expected)
    scales = _scales(expected)
    scale = max(scales.values(), default=0.0)
    sizes = {
        name: _REROUNDINGS * size + _LARGEST_ROUNDINGS * epsilon * scale / scales[name]
        for name, size in changes.items()
    }
    return {name: min(size, _LARGEST_NOISE) for name, size in sizes.items()}


class _Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the coarsest floating type that gradients flow through."""

    supports_higher_order_operators = True  # such as torch.cond

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computed = self._differentiated = 0.0
        self._hidden = False

    @property
    def epsilon(self) -> float:
        """Of all that was computed, where a custom autograd function hides a part of the backward graph."""
        return self._computed if self._hidden else self._differentiated

    def look_at(self, loss: Tensor) -> None:
        """Walk a loss's backward graph: a mask of low precision isn't in it."""
        waiting = [loss.grad_fn]
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
        for leaf in tensors_in(result):
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
        name: largest(found[name] - gradient if name in found else gradient) / scales[name]
        for name, gradient in expected.items()
        if gradient.numel()
    }


def _scales(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    sizes = {name: largest(gradient) for name, gradient in gradients.items() if gradient.numel()}
    floor = _NOISE_FLOOR * max(sizes.values(), default=0.0)
    return {name: max(size, floor) or 1.0 for name, size in sizes.items()}


def largest(tensor: Tensor) -> float:
    """The size of the largest element; 0 where there is none."""
    return float(torch.linalg.vector_norm(tensor, torch.inf)) if tensor.numel() else 0.0


def backward(
    trial: Trial,
    outputs_of: Callable[..., Iterable[Any]],
    wanted: Mapping[str, Tensor],
    look_at: Callable[[Tensor], None] = lambda loss: None,
) -> dict[str, Tensor]:
    """Gradients of the loss summed over the outputs of all heads; ``look_at`` sees it before the backward."""
    with seeded(trial.seed):
        loss = sum(map(_loss, outputs_of(*cloned(trial.inputs))))
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return {}
        look_at(loss)
        loss.backward()  # type: ignore[no-untyped-call]  # reentrant checkpointing doesn't support autograd.grad
    gradients = {name: leaf.grad for name, leaf in wanted.items() if leaf.grad is not None}
    for leaf in wanted.values():
        leaf.grad = None
    return {name: g if g.layout is torch.strided else g.to_dense() for name, g in gradients.items()}


def _loss(output: Any) -> Any:
    """A fixed random projection of all floating outputs, the same for every head."""
    generator = torch.Generator().manual_seed(1)
    total: Any = 0
    for leaf in tensors_in(output):
        if leaf.is_floating_point() or leaf.is_complex():
            weights = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
            total = total + (leaf.real * weights).sum() if leaf.is_complex() else total + (leaf * weights).sum()
    return total
