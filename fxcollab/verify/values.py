"""Checks 3 and 4: outputs bit for bit, and gradients by THE RULE against separate originals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxcollab.capture.interface import Interface
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
_ROUNDINGS = 16
_DOUBLE = torch.finfo(torch.float64).eps


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


def check_outputs(trial: Trial, straddling: frozenset[str]) -> Iterator[Check]:
    """Every head against the original that holds this head's weights, in both modes.

    The statistics that the call leaves in buffers count as output, but for ``straddling`` ones: what trunk and
    branches share is updated once by each.
    """
    for training in (True, False):
        with trial.train_model.in_mode(training), torch.no_grad(), _undisturbed():
            run = _run_train_model(trial, _copies(trial.train_model))
            for head in range(trial.tree.heads):
                yield _check_head(trial, run, head, training, straddling)
            yield _check_generated_code(trial, mode="train" if training else "eval")


def _check_head(trial: Trial, run: Run, head: int, training: bool, straddling: frozenset[str]) -> Check:
    expected = _run_original(trial, _state_of_head(trial, _copies(trial.train_model), head))
    difference = _bits_differ(run.output[head], expected.output)
    left = _state_of_head(trial, run.state, head)
    for name, buffer in expected.state.items():
        if difference is None and name not in straddling:
            found = _bits_differ(left[name], buffer)
            difference = found and f"the call leaves another {name}: {found}"
    what = "the original" if head == 0 else f"the original with head {head}'s weights"
    mode = "train" if training else "eval"
    return Check(f"head {head} in {mode} mode equals {what}", difference is None, difference or "bit for bit")


def _check_generated_code(trial: Trial, mode: str) -> Check:
    outputs = _run_train_model(trial, _copies(trial.train_model), together=False).output
    with _seeded(trial.seed):
        generated = _call(trial, trial.train_model, _copies(trial.train_model))
    difference = _bits_differ(generated, outputs)
    name = f"the generated forward runs the graph in {mode} mode"
    return Check(name, difference is None, difference or "bit for bit")


def check_gradients(trial: Trial) -> Iterator[Check]:
    """With the loss summed over heads: each gradient is the mean (or sum) of those of separate originals.

    In float64; a model that doesn't run so is compared in its own precision. Where it computes in a lower one
    inside, as behind ``x.half()``, rounding there bounds what can be asked for.
    """
    rescaled = plan_of(trial.train_model).rescale
    name = f"gradients are the {'mean' if rescaled else 'sum'} over separate originals"
    with trial.train_model.in_mode(True), _undisturbed():
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
    leaves = _copies(trial.train_model, double=double, gradients=True)
    inputs = _differentiable(trial.inputs, double)
    trial = replace(trial, inputs=inputs)
    given = {f"input {i}": v for i, v in enumerate(pytree.tree_leaves(inputs)) if isinstance(v, Tensor)}
    wanted = _unique({**leaves, **given})
    found = _backward(Lockstep(trial.train_model), "model.", leaves, trial, wanted)
    sums: dict[str, Tensor] = {}
    descendants: dict[str, int] = {}
    precision = _Precision()
    for head in range(trial.tree.heads):
        state = _state_of_head(trial, leaves, head)
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
    own = {f"model.{prefix}{name}": tensor for name, tensor in _with_own_buffers(state).items()}
    with _seeded(trial.seed):
        gradients: dict[str, Tensor] = functional_call(runner, own, ())
    return gradients


class _Backward(nn.Module):
    def __init__(self, model: nn.Module, trial: Trial, wanted: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._trial, self._wanted = trial, wanted

    def forward(self) -> dict[str, Tensor]:
        values = _fresh(self._trial.inputs)
        if isinstance(self.model, Lockstep):
            outputs = self.model(*values)
            return _gradients(sum(map(_loss, outputs)), self._wanted)
        args, kwargs = self._trial.interface.call(self.model, values)
        return _gradients(_loss(self.model(*args, **kwargs)), self._wanted)


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


@dataclass(frozen=True)
class Run:
    """What a call returned, and the state that it left."""

    output: Any
    state: Mapping[str, Tensor]


def _run_train_model(trial: Trial, state: Mapping[str, Tensor], *, together: bool = True) -> Run:
    model, own = Lockstep(trial.train_model, together=together), _with_own_buffers(state)
    prefixed = {f"model.{name}": tensor for name, tensor in own.items()}
    with _seeded(trial.seed):
        return Run(functional_call(model, prefixed, _fresh(trial.inputs)), own)


def _run_original(trial: Trial, state: Mapping[str, Tensor]) -> Run:
    own = _with_own_buffers(state)
    with _seeded(trial.seed):
        return Run(_call(trial, trial.model, own), own)


def _call(trial: Trial, model: nn.Module, state: Mapping[str, Tensor]) -> Any:
    args, kwargs = trial.interface.call(model, _fresh(trial.inputs))
    return functional_call(model, dict(state), tuple(args), kwargs)  # which changes the mapping it is given


def _fresh(inputs: Inputs) -> tuple[Any, ...]:
    """The inputs for one run, which may write into them; gradients reach the given ones."""
    return tuple(pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, list(inputs)))


def _with_own_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a run may write into is its own: statistics, counters, the vectors of a spectral norm."""
    own = {id(tensor): tensor if tensor.requires_grad else tensor.clone() for tensor in state.values()}
    return {name: own[id(tensor)] for name, tensor in state.items()}


def _copies(train_model: CollabGraphModule, *, double: bool = False, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of all state under all names; tensors that were one stay one."""
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for kind in (train_model.named_parameters, train_model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            if id(tensor) not in copies:
                copy = _widened(tensor.detach().clone(), double)
                copies[id(tensor)] = copy.requires_grad_(gradients and tensor.requires_grad)
            state[name] = copies[id(tensor)]
    return state


def _differentiable(inputs: Inputs, double: bool) -> tuple[Any, ...]:
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        return _widened(value.detach(), double).requires_grad_()

    return tuple(pytree.tree_map(leaf, list(inputs)))


def _widened(tensor: Tensor, double: bool) -> Tensor:
    """In double precision, if asked for and a floating tensor."""
    if not double:
        return tensor
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _state_of_head(trial: Trial, state: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """What the original needs to be this head, by its own names."""
    keys = prune_names(state, head, peers=plan_of(trial.train_model).peers)
    return {name: state[key] for name, key in keys.items()}


def _bits_differ(one: Any, other: Any) -> str | None:
    """How two output structures differ, in words; None where they are equal bit for bit."""
    one, other = _opened(one), _opened(other)
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
    return (leaf for leaf in pytree.tree_leaves(_opened(output)) if isinstance(leaf, Tensor))


def _opened(output: Any) -> Any:
    """The output with its dataclasses, into which pytree doesn't look, as named fields."""

    def fields(value: Any) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type | dict):
            return value
        named = {field.name: _opened(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {type(value).__qualname__: named}

    return pytree.tree_map(fields, output)


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
