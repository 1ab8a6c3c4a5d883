"""The collaborative loss against the paper's equations, and against what people feed it."""

from __future__ import annotations

import copy
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxcollab.errors import ObjectiveError
from fxcollab.objectives.collaborative import CollaborativeLoss
from fxcollab.objectives.consensus import consensus
from tests.speeds import slow_but

SAMPLES, CLASSES = 3, 4


def some_logits(heads: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shape = shape or (SAMPLES, CLASSES)
    return [
        (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(heads)
    ]


def some_indices(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape or (SAMPLES,), generator=torch.Generator().manual_seed(0))


def some_soft_labels(*shape: int) -> Tensor:
    raw = torch.rand(shape or (SAMPLES, CLASSES), generator=torch.Generator().manual_seed(0)).double() + 0.1
    return raw / raw.sum(1, keepdim=True)


# --- The equations, one number at a time ---


def sigma(z: list[Any], temperature: float) -> list[Any]:
    """Equation 2 for one sample."""
    powers = [(value / temperature).exp() for value in z]
    total = sum(powers)
    return [power / total for power in powers]


def cross_entropy(labels: list[Any], probabilities: list[Any]) -> Any:
    return -sum(y * p.log() for y, p in zip(labels, probabilities, strict=True))


def by_the_equations(heads: list[Tensor], labels: Tensor, beta: float, temperature: float, detach: bool) -> Tensor:
    """Equations 3 and 4 over scalars: heads are (N, C), labels are (N, C) and sum to 1."""
    samples = len(labels)
    logits = [[list(row) for row in z] for z in heads]
    total = torch.zeros((), dtype=torch.float64)
    for h, own in enumerate(logits):
        others = logits[:h] + logits[h + 1 :]
        for n, y in enumerate(labels):
            hard = cross_entropy(list(y), sigma(own[n], 1))
            mean = [sum(values) / len(others) for values in zip(*(z[n] for z in others), strict=True)]
            q = [p.detach() if detach else p for p in sigma(mean, temperature)]
            soft = cross_entropy(q, sigma(own[n], temperature))
            total = total + (beta * hard + (1 - beta) * temperature**2 * soft) / samples
    return total


def one_hot(indices: Tensor, classes: int = CLASSES) -> Tensor:
    return torch.eye(classes, dtype=torch.float64)[indices]


def flat(dense: Tensor) -> Tensor:
    """(N, C, d1, ...) as (N * d1 * ..., C)."""
    return dense.movedim(1, -1).reshape(-1, dense.shape[1])


def assert_same_value_and_gradients(got: Tensor, expected: Tensor, heads: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    got_gradients = torch.autograd.grad(got, heads)
    expected_gradients = torch.autograd.grad(expected, heads)
    torch.testing.assert_close(got_gradients, expected_gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("heads", slow_but([2, 3, 8], range(2, 9)))
def test_value_and_gradients_follow_the_equations(heads: int, temperature: float, beta: float, detach: bool) -> None:
    z, y = some_logits(heads), some_indices()
    got = CollaborativeLoss(beta, temperature, detach=detach)(z, y)
    assert_same_value_and_gradients(got, by_the_equations(z, one_hot(y), beta, temperature, detach), z)


@pytest.mark.parametrize("detach", [True, False])
def test_soft_labels_follow_the_equations(detach: bool) -> None:
    z, y = some_logits(3), some_soft_labels()
    got = CollaborativeLoss(detach=detach)(z, y)
    assert_same_value_and_gradients(got, by_the_equations(z, y, 0.5, 2.0, detach), z)


@pytest.mark.parametrize("positions", [(5,), (2, 3)])
def test_dense_outputs_average_over_batch_and_positions(positions: tuple[int, ...]) -> None:
    z, y = some_logits(3, 2, CLASSES, *positions), some_indices(2, *positions)
    expected = by_the_equations([flat(head) for head in z], one_hot(y.flatten()), 0.5, 2.0, True)
    assert_same_value_and_gradients(CollaborativeLoss()(z, y), expected, z)


def test_dense_soft_labels_follow_the_equations() -> None:
    z, y = some_logits(2, 2, CLASSES, 2, 3), some_soft_labels(2, CLASSES, 2, 3)
    expected = by_the_equations([flat(head) for head in z], flat(y), 0.5, 2.0, True)
    assert_same_value_and_gradients(CollaborativeLoss()(z, y), expected, z)


def test_detached_gradient_is_the_closed_form() -> None:
    z, y, beta, temperature = some_logits(3), some_indices(), 0.3, 4.0
    CollaborativeLoss(beta, temperature)(z, y).backward()
    for head, c in zip(z, consensus([head.detach() for head in z]), strict=True):
        hard = head.detach().softmax(1) - one_hot(y)
        soft = (head.detach() / temperature).softmax(1) - (c / temperature).softmax(1)
        expected = (beta * hard + (1 - beta) * temperature * soft) / SAMPLES
        torch.testing.assert_close(head.grad, expected, rtol=1e-12, atol=1e-14)


def test_sum_is_the_mean_times_the_positions() -> None:
    z, y = some_logits(3, 2, CLASSES, 5), some_indices(2, 5)
    torch.testing.assert_close(CollaborativeLoss(reduction="sum")(z, y), CollaborativeLoss()(z, y) * 10)


# --- The consensus ---


@pytest.mark.parametrize("heads", [2, 3, 5])
def test_consensus_is_the_mean_of_the_other_heads(heads: int) -> None:
    z = some_logits(heads)
    for h, c in enumerate(consensus(z)):
        torch.testing.assert_close(c, torch.stack(z[:h] + z[h + 1 :]).mean(0))


def test_consensus_of_one_head_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="at least 2 heads, not 1"):
        consensus(some_logits(1))


def test_consensus_does_not_broadcast() -> None:
    with pytest.raises(ObjectiveError, match="one shape"):
        consensus([torch.zeros(3, 4), torch.zeros(1, 4)])


# --- The loss on the labels ---


def test_beta_one_is_individual_learning() -> None:
    z, y = some_logits(3), some_indices()
    expected = sum(nn.functional.cross_entropy(head, y) for head in z)
    assert torch.equal(CollaborativeLoss(beta=1)(z, y), expected)


def test_a_single_head_learns_from_labels_alone() -> None:
    z, y = some_logits(1), some_indices()
    assert torch.equal(CollaborativeLoss(beta=1)(z, y), nn.functional.cross_entropy(z[0], y))


def test_hard_loss_may_smooth_labels() -> None:
    z, y = some_logits(3), some_indices()
    smoothed = 0.9 * one_hot(y) + 0.1 / CLASSES
    got = CollaborativeLoss(hard=nn.CrossEntropyLoss(label_smoothing=0.1))(z, y)
    assert_same_value_and_gradients(got, by_the_equations(z, smoothed, 0.5, 2.0, True), z)


def test_hard_loss_may_be_any_callable_with_its_own_target() -> None:
    z, y = some_logits(2), one_hot(some_indices()).long()

    def multi_label(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, target.double())

    expected = sum(multi_label(head, y) for head in z)
    assert torch.equal(CollaborativeLoss(beta=1, hard=multi_label, task="multi-label")(z, y), expected)


def test_uint8_masks_are_class_indices() -> None:
    z, y = some_logits(2), some_indices()
    assert torch.equal(CollaborativeLoss()(z, y.to(torch.uint8)), CollaborativeLoss()(z, y))


# --- Forms of a head's output ---


Named = namedtuple("Named", ["logits", "aux"])


@dataclass
class Record:
    aux: Tensor | None
    logits: Tensor


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


STRUCTURES: list[Callable[[Tensor], object]] = [
    lambda z: {"aux": None, "logits": z},
    lambda z: Named(z, None),
    lambda z: Record(None, z),
    Plain,
]
STRUCTURE_NAMES = ["mapping", "namedtuple", "dataclass", "object"]


@pytest.mark.parametrize("structure", STRUCTURES, ids=STRUCTURE_NAMES)
def test_logits_are_found_in_structures(structure: Callable[[Tensor], object]) -> None:
    z, y = some_logits(3), some_indices()
    outputs = tuple(structure(head) for head in z)
    assert torch.equal(CollaborativeLoss()(outputs, y), CollaborativeLoss()(z, y))


def test_logits_field_has_the_users_name() -> None:
    z, y = some_logits(2, 2, CLASSES, 3, 3), some_indices(2, 3, 3)
    outputs = tuple({"out": head, "aux": head.detach()} for head in z)
    assert torch.equal(CollaborativeLoss(logits="out")(outputs, y), CollaborativeLoss()(z, y))


class Penalised(CollaborativeLoss):
    """A loss of one's own."""

    def losses(self, heads: list[Tensor], target: Any) -> list[Tensor]:
        return [loss + z.square().mean() for loss, z in zip(super().losses(heads, target), heads, strict=True)]


def test_what_a_subclass_changes_counts_in_training() -> None:
    z, y = some_logits(3), some_indices()
    loss = Penalised()
    torch.testing.assert_close(loss(z, y), sum(loss.per_head(z, y)))
    assert loss(z, y) > CollaborativeLoss()(z, y)


def test_hooks_of_the_hard_loss_run() -> None:
    z, y, seen = some_logits(3), some_indices(), []
    loss = CollaborativeLoss()
    loss.hard.register_forward_hook(lambda *call: seen.append(call))
    loss(z, y)
    assert len(seen) == 3


def test_bytes_may_name_any_of_many_classes() -> None:
    z = [torch.randn(3, 300, requires_grad=True) for _ in range(2)]
    y = torch.tensor([1, 2, 255], dtype=torch.uint8)
    assert torch.equal(CollaborativeLoss()(z, y), CollaborativeLoss()(z, y.long()))


# --- Where people train ---


def test_gradcheck_through_the_consensus() -> None:
    y = some_indices()
    loss = CollaborativeLoss(0.3, detach=False)
    assert torch.autograd.gradcheck(lambda *z: loss(z, y), some_logits(3))
    assert torch.autograd.gradgradcheck(lambda *z: loss(z, y), some_logits(3))


def test_gradcheck_with_soft_labels_that_learn() -> None:
    loss = CollaborativeLoss(0.3, detach=False)
    y = some_soft_labels().requires_grad_()
    assert torch.autograd.gradcheck(lambda y, *z: loss(z, y), (y, *some_logits(2)))


def test_detached_double_backward_holds_the_consensus_constant() -> None:
    z, y = some_logits(2), some_indices()
    (gradient,) = torch.autograd.grad(CollaborativeLoss(0.3)(z, y), z[0], create_graph=True)
    own, other = torch.autograd.grad(gradient.square().sum(), z, allow_unused=True)
    assert own.abs().max() > 0
    assert other is None


@pytest.mark.parametrize("structure", slow_but(STRUCTURES[:1], STRUCTURES), ids=STRUCTURE_NAMES)
@pytest.mark.parametrize("detach", slow_but([True], [True, False]))
def test_compiles_to_one_graph(detach: bool, structure: Callable[[Tensor], object]) -> None:
    torch.compiler.reset()
    z, y = some_logits(3), some_indices()
    loss = CollaborativeLoss(detach=detach)
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    outputs = tuple(structure(head) for head in z)
    assert_same_value_and_gradients(step(outputs, y), loss(outputs, y), z)


@pytest.mark.slow
def test_compiles_with_dynamic_sizes() -> None:
    torch.compiler.reset()
    loss = CollaborativeLoss()
    step = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (3, 5):
        z, y = some_logits(2, samples, CLASSES, 6), some_indices(samples, 6)
        assert_same_value_and_gradients(step(z, y), loss(z, y), z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, y = some_logits(3, dtype=dtype), some_indices()
    got = CollaborativeLoss()(z, y)
    assert got.dtype == torch.float32
    assert torch.equal(got, CollaborativeLoss()([head.float() for head in z], y))
    assert {gradient.dtype for gradient in torch.autograd.grad(got, z)} == {dtype}


def test_autocast_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    networks = nn.ModuleList(nn.Linear(6, CLASSES) for _ in range(3))
    x, y = torch.randn(SAMPLES, 6), some_indices()
    loss = CollaborativeLoss(detach=False)
    with torch.autocast("cpu", torch.bfloat16):
        z = [network(x) for network in networks]
        got = loss(z, y)
    assert z[0].dtype == torch.bfloat16
    assert torch.equal(got, loss([head.float() for head in z], y))
    got.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks.parameters())


def test_float64_stays_float64() -> None:
    assert CollaborativeLoss()(some_logits(2), some_indices()).dtype == torch.float64


def test_extreme_logits_stay_finite() -> None:
    z = [torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])]
    assert CollaborativeLoss()(z, torch.tensor([2])).isfinite()


def test_keeps_no_state_and_copies() -> None:
    loss = CollaborativeLoss(0.3, 4.0, detach=False)
    z, y = some_logits(2), some_indices()
    assert not loss.state_dict()
    assert torch.equal(copy.deepcopy(loss)(z, y), loss(z, y))


def test_prints_its_options() -> None:
    text = repr(CollaborativeLoss(0.3, 4.0, detach=False, logits="out", hard=nn.functional.cross_entropy))
    for option in ("beta=0.3", "temperature=4.0", "detach=False", "logits='out'", "reduction='mean'"):
        assert option in text
    assert "hard=<function cross_entropy" in text
    assert "(hard): CrossEntropyLoss()" in repr(CollaborativeLoss())


class OperationCount(TorchDispatchMode):
    """Counts the operations that reach the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("detach", [True, False])
def test_every_further_head_costs_the_same(detach: bool) -> None:
    def step(heads: int) -> Counter[str]:
        z, y = some_logits(heads), some_indices()
        with OperationCount() as operations:
            CollaborativeLoss(detach=detach)(z, y).backward()
        return operations.count

    two, three, four, eight = (step(heads) for heads in (2, 3, 4, 8))
    assert four["aten._softmax.default"] == 4, "a consensus a head"
    for name in eight:
        one_more = four[name] - three[name]
        assert three[name] - two[name] == one_more, name
        assert eight[name] - four[name] == 4 * one_more, name


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta must be in (0, 1], not 0."),
        ({"beta": -0.5}, "beta must be in (0, 1], not -0.5."),
        ({"beta": 1.5}, "beta must be in (0, 1], not 1.5."),
        ({"beta": float("nan")}, "beta must be in (0, 1], not nan."),
        ({"beta": "0.5"}, "beta must be a number, not '0.5'."),
        ({"beta": True}, "beta must be a number, not True."),
        ({"beta": nn.Parameter(torch.tensor(0.5))}, "can't be learnt"),
        ({"temperature": None}, "temperature must be a number, not None."),
        ({"temperature": 0}, "temperature must be finite and above 0, not 0."),
        ({"temperature": -1.0}, "temperature must be finite and above 0, not -1.0."),
        ({"temperature": float("inf")}, "temperature must be finite and above 0, not inf."),
        ({"reduction": "batchmean"}, "reduction must be 'mean', 'sum' or 'none', not 'batchmean'."),
        ({"hard": "ce"}, "hard must be a callable (logits, target) to a scalar, not 'ce'."),
        ({"hard": nn.CrossEntropyLoss}, "Pass an instance or a function"),
        ({"hard": nn.CrossEntropyLoss(reduction="none")}, "reduction 'none', the soft one 'mean'"),
        ({"hard": nn.CrossEntropyLoss(), "reduction": "sum"}, "Give the hard loss reduction='sum'."),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        CollaborativeLoss(**options)
    assert message in str(caught.value)
    assert caught.value.hint


Z, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
DENSE = torch.zeros(2, 4, 5, 5)
UNNAMED = [(Z, None), (Z, None)]
SEGMENTED = [{"out": Z, "aux": Z}] * 2
RENAMED = [Named(Z, None), namedtuple("Other", ["logit", "aux"])(Z, None)]


@pytest.mark.parametrize(
    ("outputs", "target", "messages"),
    [
        pytest.param(Z, Y, ["one output per head, not a tensor of shape (3, 4) and dtype float32"], id="one tensor"),
        pytest.param({"logits": Z}, Y, ["one output per head, not a value of type dict"], id="one structure"),
        pytest.param((), Y, ["one output per head, not an empty tuple"], id="no heads"),
        pytest.param((Z,), Y, ["at least 2 heads, not 1", "CollaborativeLoss(beta=1)"], id="one head"),
        pytest.param((Z, Z[:, :3]), Y, ["not (3, 4) and (3, 3)", "heads 0 and 1"], id="classes differ"),
        pytest.param((Z, Z[:1]), Y, ["not (3, 4) and (1, 4)", "heads 0 and 1"], id="batches differ"),
        pytest.param((Z[0], Z[0]), Y, ["(N, C)", "this is a tensor of shape (4,)", "unsqueeze"], id="unbatched"),
        pytest.param((Z, Z), Y + 4, ["holds 4", "classes 0 to 3", "3 of 3", "ignore_index=4"], id="no such class"),
        pytest.param((Z, Z), Y - 1, ["holds -1", "classes 0 to 3"], id="negative class"),
        pytest.param((Z, Z.long()), Y, ["floating-point", "dtype int64", "head 1"], id="integer logits"),
        pytest.param(
            SEGMENTED, Y, ["no logits under 'logits'", "head 0", "out, aux", "logits='out'"], id="other key"
        ),
        pytest.param(RENAMED, Y, ["head 1", "fields logit, aux", "logits='logit'"], id="other field"),
        pytest.param([Record(Z, None)] * 2, Y, ["'logits' of this Record is None"], id="empty field"),
        pytest.param(UNNAMED, Y, ["tuple has no named fields", "logits=0"], id="plain tuple"),
        pytest.param((Z, Z), [0, 1, 2], ["target is a value of type list", "torch.as_tensor"], id="target list"),
        pytest.param(
            (Z, Z),
            Y[:2],
            ["a tensor of shape (2,) and dtype int64", "indices of shape (3,)"],
            id="short target",
        ),
        pytest.param((Z, Z), Y[:, None], ["of shape (3, 1)", "squeeze(1)"], id="target column"),
        pytest.param((Z, Z), Y.float(), ["dtype float32", "target.long()"], id="float indices"),
        pytest.param((Z, Z), Y.int(), ["dtype int32", "target.long()"], id="int32 indices"),
        pytest.param((Z, Z), Z.long(), ["soft labels of shape (3, 4)", "target.float()"], id="integer one-hot"),
        pytest.param((Z, Z), Z[:, :3], ["of shape (3, 3)", "soft labels of shape (3, 4)"], id="soft classes"),
        pytest.param((DENSE, DENSE), Y[:2], ["class indices of shape (2, 5, 5)"], id="dense target"),
    ],
)
def test_bad_input_is_refused(outputs: Any, target: Any, messages: list[str]) -> None:
    with pytest.raises(ObjectiveError) as caught:
        CollaborativeLoss()(outputs, target)
    for message in messages:
        assert message in str(caught.value)
    assert caught.value.hint


def test_wrong_target_is_refused_for_a_single_head_too() -> None:
    with pytest.raises(ObjectiveError, match="doesn't fit logits of shape"):
        CollaborativeLoss(beta=1)((Z,), Y[:2])


def test_hard_loss_that_is_no_scalar_is_refused() -> None:
    def per_sample(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target, reduction="none")

    with pytest.raises(ObjectiveError, match=r"returned a tensor of shape \(3,\) and dtype float32, not"):
        CollaborativeLoss(hard=per_sample, task="classification")((Z, Z), Y)
    with pytest.raises(ObjectiveError, match=r"not of shape \(2, 5, 5\)"):
        CollaborativeLoss(hard=lambda z, y: z.sum((1, 2, 3)), task="classification", reduction="none")(
            (DENSE, DENSE), torch.zeros(2, 5, 5, dtype=torch.long)
        )
