"""The other objectives, tasks beyond one label, and what all objectives share, against numbers taken one by one."""

from __future__ import annotations

import copy
import math
import warnings
from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxcollab
from fxcollab.errors import ObjectiveError
from fxcollab.objectives.collaborative import CollaborativeLoss
from fxcollab.objectives.consensus import consensus
from fxcollab.objectives.distillation import DistillationLoss
from fxcollab.objectives.gated import Gate, ONELoss
from fxcollab.objectives.kdcl import KDCLLoss
from fxcollab.objectives.mutual import MutualLoss
from fxcollab.objectives.objective import Objective
from tests.objectives.test_collaborative_loss import OperationCount

SAMPLES, CLASSES = 3, 4
Logits = Sequence[Any]


def some_logits(heads: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shape = shape or (SAMPLES, CLASSES)
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(heads)]


def some_indices(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape or (SAMPLES,), generator=torch.Generator().manual_seed(0))


def assert_same(got: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    gradients = torch.autograd.grad(got, inputs)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, inputs, retain_graph=True), rtol=1e-11, atol=1e-13
    )


# --- References over scalars ---


def sigma(z: Logits, temperature: float) -> list[Any]:
    powers = [(value / temperature).exp() for value in z]
    return [power / sum(powers) for power in powers]


def kl(p: Logits, q: Logits) -> Any:
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def constant(values: Logits, detach: bool) -> list[Any]:
    return [value.detach() for value in values] if detach else list(values)


def of_each_sample(heads: list[Tensor], y: Tensor, loss: Callable[[list[list[Any]], int], Any]) -> Tensor:
    """The mean over samples of a loss of all heads' logits of one sample, and its class."""
    total = sum(loss([list(z[n]) for z in heads], int(label)) for n, label in enumerate(y))
    return total / len(y)


# --- Deep mutual learning ---


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("heads", "temperature", "weight"), [(2, 1.0, 1.0), (3, 2.0, 0.5), (5, 4.0, 1.0)])
def test_mutual_learning_sums_the_divergence_from_each_peer(
    heads: int, temperature: float, weight: float, detach: bool
) -> None:
    def one(rows: list[list[Any]], label: int) -> Any:
        total = torch.zeros((), dtype=torch.float64)
        for h, own in enumerate(rows):
            total = total - sigma(own, 1)[label].log()
            for j, other in enumerate(rows):
                if j != h:
                    p = constant(sigma(other, temperature), detach)
                    share = weight / (len(rows) - 1)
                    total = total + share * temperature**2 * kl(p, sigma(own, temperature))
        return total

    z, y = some_logits(heads), some_indices()
    assert_same(MutualLoss(temperature, weight, detach=detach)(z, y), of_each_sample(z, y, one), z)


def test_two_heads_learn_the_same_from_a_consensus_as_from_each_other() -> None:
    z, y = some_logits(2), some_indices()
    mutual = torch.autograd.grad(MutualLoss(2.0)(z, y), z)
    collaborative = torch.autograd.grad(2 * CollaborativeLoss(0.5, 2.0)(z, y), z)
    torch.testing.assert_close(mutual, collaborative)


# --- KDCL ---


@pytest.mark.parametrize("ensemble", ["naive", "min-logit", "mean"])
@pytest.mark.parametrize("heads", [2, 4])
def test_kdcl_teaches_all_heads_by_one_ensemble(ensemble: str, heads: int) -> None:
    def teacher(rows: list[list[Any]], label: int) -> list[Any]:
        if ensemble == "naive":
            return min(rows, key=lambda row: -sigma(row, 1)[label].detach())
        if ensemble == "mean":
            return [sum(values) / len(rows) for values in zip(*rows, strict=True)]
        return [min((row[c] - row[label] for row in rows), key=Tensor.item) for c in range(CLASSES)]

    def one(rows: list[list[Any]], label: int) -> Any:
        taught = sigma(constant(teacher(rows, label), True), 3.0)
        return sum(-sigma(row, 1)[label].log() + 0.7 * 9 * kl(taught, sigma(row, 3.0)) for row in rows)

    z, y = some_logits(heads), some_indices()
    assert_same(KDCLLoss(ensemble, 3.0, 0.7)(z, y), of_each_sample(z, y, one), z)


@pytest.mark.parametrize("ensemble", ["naive", "min-logit", "mean"])
def test_kdcl_of_dense_outputs_chooses_at_every_position(ensemble: str) -> None:
    z, y = some_logits(3, 2, CLASSES, 5), some_indices(2, 5)
    flat = [head.movedim(1, -1).reshape(-1, CLASSES) for head in z]
    assert_same(KDCLLoss(ensemble)(z, y), KDCLLoss(ensemble)(flat, y.flatten()), z)


def test_kdcl_takes_an_ensemble_of_your_own() -> None:
    z, y = some_logits(3), some_indices()
    first = KDCLLoss(lambda heads, target: heads[0])(z, y)
    taught = DistillationLoss(beta=0.5, temperature=2.0)
    gradients = torch.autograd.grad(first, z)
    expected = torch.autograd.grad(2 * taught(z, y, [z[0].detach()]), z)
    torch.testing.assert_close(gradients, expected)


# --- ONE ---


class Fixed(nn.Module):
    """A gate that hands its features through: weights by hand."""

    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.mark.parametrize("detach", [True, False])
def test_one_weighs_heads_by_a_gate(detach: bool) -> None:
    weights = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]], dtype=torch.float64)
    z, y = some_logits(3), some_indices()
    expected = torch.zeros((), dtype=torch.float64)
    for n, label in enumerate(y):
        rows = [list(head[n]) for head in z]
        ensemble = [sum(w * row[c] for w, row in zip(weights[n], rows, strict=True)) for c in range(CLASSES)]
        p = constant(sigma(ensemble, 3.0), detach)
        expected = expected - sigma(ensemble, 1)[label].log()
        for row in rows:
            expected = expected - sigma(row, 1)[label].log() + 9 * kl(p, sigma(row, 3.0))
    assert_same(ONELoss(Fixed(), heads=3, detach=detach)(z, y, weights), expected / SAMPLES, z)


def test_the_gate_of_one_learns_from_what_the_trunk_gives() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    train_model = fxcollab.transform(model, "simple", ["1"], heads=3, seed=0)
    seen: dict[str, Tensor] = {}
    train_model.get_submodule("1").register_forward_hook(lambda _, inputs, out: seen.update(features=out))
    loss = ONELoss(features=6, heads=3)
    outputs = train_model(torch.randn(4, 1, 5, 5))
    loss(outputs, torch.tensor([0, 1, 2, 3]), seen["features"]).backward()
    assert all(parameter.grad is not None for parameter in [*loss.parameters(), *train_model.parameters()])
    assert torch.allclose(loss.gate(seen["features"]).sum(1), torch.ones(4))


def test_the_gate_sees_vectors_and_maps() -> None:
    gate = Gate(5, 3).eval()
    maps = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(gate(maps), gate(maps.mean((2, 3))))


# --- Distillation ---


def test_distillation_is_the_third_equation_with_the_teachers_mean() -> None:
    [z], y, teachers = some_logits(1), some_indices(), some_logits(3)
    [a, b, c] = [teacher.detach() for teacher in teachers]
    expected = torch.zeros((), dtype=torch.float64)
    for n, label in enumerate(y):
        q = sigma(list((a[n] + b[n] + c[n]) / 3), 2.0)
        soft = -sum(p * s.log() for p, s in zip(q, sigma(list(z[n]), 2.0), strict=True))
        expected = expected - 0.3 * sigma(list(z[n]), 1)[label].log() + 0.7 * 4 * soft
    got = DistillationLoss(0.3)((z,), y, teachers)
    assert_same(got, expected / SAMPLES, [z])
    assert all(
        g is None for g in torch.autograd.grad(DistillationLoss()((z,), y, teachers), teachers, allow_unused=True)
    )


# --- Multi-label tasks and regression ---


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 1), (SAMPLES, 5), (2, 3, 2, 2)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_multi_label_consensus_is_the_sigmoid_of_the_mean(shape: tuple[int, ...], temperature: float) -> None:
    z, beta = some_logits(3, *shape), 0.4
    y = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5).double()

    def binary(label: Any, value: Any) -> Any:
        p = 1 / (1 + (-value).exp())
        return -(label * p.log() + (1 - label) * (1 - p).log())

    expected = torch.zeros((), dtype=torch.float64)
    for h, own in enumerate(z):
        others = [other.detach().flatten() for j, other in enumerate(z) if j != h]
        for i, (value, label) in enumerate(zip(own.flatten(), y.flatten(), strict=True)):
            mean = sum(other[i] for other in others) / 2
            q = 1 / (1 + (-mean / temperature).exp())
            soft = binary(q, value / temperature)
            expected = expected + beta * binary(label, value) + (1 - beta) * temperature**2 * soft
    for loss in (
        CollaborativeLoss(beta, temperature, task="multi-label"),
        CollaborativeLoss(beta, temperature, hard=nn.BCEWithLogitsLoss()),
        CollaborativeLoss(beta, temperature, hard=nn.functional.binary_cross_entropy_with_logits),
    ):
        assert_same(loss(z, y), expected / y.numel(), z)


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 5), (2, 1, 3, 3)])
def test_regression_learns_towards_the_mean_of_the_others(shape: tuple[int, ...]) -> None:
    z, y, beta = some_logits(3, *shape), torch.ones(shape, dtype=torch.float64), 0.4
    expected = torch.zeros((), dtype=torch.float64)
    for h, own in enumerate(z):
        mean = sum(other.detach() for j, other in enumerate(z) if j != h) / 2
        expected = expected + (beta * (own - y) ** 2 + (1 - beta) * (own - mean) ** 2).sum() / y.numel()
    for loss in (CollaborativeLoss(beta, task="regression"), CollaborativeLoss(beta, hard=nn.MSELoss())):
        assert_same(loss(z, y), expected, z)


def test_regression_measures_the_consensus_as_it_does_the_labels() -> None:
    z, y = some_logits(2), torch.zeros(SAMPLES, CLASSES, dtype=torch.float64)
    expected = sum(0.5 * own.abs().mean() + 0.5 * (own - other.detach()).abs().mean() for own, other in (z, z[::-1]))
    assert_same(CollaborativeLoss(hard=nn.L1Loss())(z, y), expected, z)


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression"])
def test_mutual_learning_of_equal_heads_is_the_loss_on_the_labels(task: str) -> None:
    [z] = some_logits(1)
    y = some_indices() if task == "classification" else torch.rand_like(z)
    torch.testing.assert_close(MutualLoss(task=task)([z, z], y), 2 * CollaborativeLoss(1, task=task)([z], y))


# --- What all objectives share ---

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "collaborative": CollaborativeLoss,
    "mutual": MutualLoss,
    "min-logit": KDCLLoss,
    "naive": lambda **options: KDCLLoss("naive", **options),
}


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Callable[..., Objective]:
    return OBJECTIVES[request.param]


def test_heads_parts_sum_to_the_loss(objective: Callable[..., Objective]) -> None:
    z, y, loss = some_logits(4), some_indices(), objective()
    parts = loss.per_head(z, y)
    assert len(parts) == 4
    torch.testing.assert_close(sum(parts[1:], parts[0]), loss(z, y), rtol=1e-12, atol=1e-14)


def test_detached_parts_send_gradient_to_their_head_alone(objective: Callable[..., Objective]) -> None:
    z, y = some_logits(3), some_indices()
    gradients = torch.autograd.grad(objective().per_head(z, y)[1], z, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [False, True, False]


def test_detached_parts_are_differentiated_one_by_one(objective: Callable[..., Objective]) -> None:
    z, y = some_logits(3), some_indices()
    parts = objective().per_head([2 * head for head in z], y)
    for part, head in zip(parts, z, strict=True):
        part.backward(inputs=[head])
    expected = torch.autograd.grad(objective()([2 * head for head in z], y), z)
    torch.testing.assert_close([head.grad for head in z], [*expected])


def test_gradients_through_what_is_learnt_from(objective: Callable[..., Objective]) -> None:
    loss, y = objective(detach=False), some_indices()
    assert torch.autograd.gradcheck(lambda *z: loss(z, y), some_logits(3))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, indirect=True)
def test_objectives_compile_to_one_graph(objective: Callable[..., Objective]) -> None:
    z, y, loss = some_logits(3), some_indices(), objective()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(z, y), loss(z, y), z)


def test_vmap_and_meta_tensors_are_not_asked_for_values() -> None:
    z, y = some_logits(2, 5, SAMPLES, CLASSES), some_indices(5, SAMPLES)
    each = torch.vmap(lambda a, b, t: CollaborativeLoss()((a, b), t))(*z, y)
    torch.testing.assert_close(each.mean(), CollaborativeLoss()([head.flatten(0, 1) for head in z], y.flatten()))
    meta = [head.detach().to("meta") for head in some_logits(2)]
    assert CollaborativeLoss()(meta, some_indices().to("meta")).is_meta


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_by_head(bad: float, objective: Callable[..., Objective]) -> None:
    z, y = [head.detach() for head in some_logits(3)], some_indices()
    z[2][1] = bad
    with pytest.raises(ObjectiveError) as caught:
        objective()(z, y)
    for message in ("The loss is", "head 2", "1 of 3 samples", "finite=False"):
        assert message in str(caught.value)
    assert not torch.isfinite(objective(finite=False)(z, y))


def test_a_loss_that_is_not_finite_by_its_target_is_refused() -> None:
    z = some_logits(2)
    with pytest.raises(ObjectiveError, match="from the target"):
        CollaborativeLoss()(z, torch.full((SAMPLES, CLASSES), math.nan, dtype=torch.float64))
    with pytest.raises(ObjectiveError, match="temperature so high"):
        CollaborativeLoss(temperature=1.3e154)(z, some_indices())


def test_objectives_print_options_and_copy(objective: Callable[..., Objective]) -> None:
    z, y, loss = some_logits(2), some_indices(), objective()
    assert "temperature=" in repr(loss)
    assert "task='classification'" in repr(loss)
    assert torch.equal(copy.deepcopy(loss)(z, y), loss(z, y))


# --- Found by trying ---


def subclass(kind: Any) -> Any:
    return type("Mine", (kind,), {})


@pytest.mark.parametrize(
    ("hard", "task"),
    [
        (subclass(nn.BCEWithLogitsLoss)(), "multi-label"),
        (partial(nn.functional.binary_cross_entropy_with_logits, pos_weight=torch.ones(CLASSES)), "multi-label"),
        (subclass(nn.MSELoss)(), "regression"),
        (partial(nn.functional.huber_loss, delta=0.5), "regression"),
        (torch.compile(nn.MSELoss()), "regression"),
        (nn.MultiMarginLoss(), "classification"),
    ],
)
def test_the_task_goes_by_the_loss_inside(hard: Any, task: str) -> None:
    assert CollaborativeLoss(hard=hard).task.name == task


def soft_dice(z: Tensor, y: Tensor) -> Tensor:
    return 1 - (z.sigmoid() * y).mean()


@pytest.mark.parametrize("hard", [soft_dice, lambda z, y: z.sum(), partial(soft_dice), nn.Identity()])
def test_a_loss_of_ones_own_asks_for_the_task(hard: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"(?s)It isn't known what .* compares.*task='multi-label'"):
        CollaborativeLoss(hard=hard)
    assert CollaborativeLoss(hard=hard, task="multi-label").task.name == "multi-label"


@pytest.mark.parametrize("shape", [(6, 1), (6, 1, 4, 4)])
@pytest.mark.parametrize("objective", [CollaborativeLoss(), MutualLoss(), KDCLLoss()])
def test_a_classification_of_one_class_is_refused(objective: Any, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape)
    with pytest.raises(ObjectiveError, match=r'(?s)two classes or more.*task="multi-label"'):
        objective((z, -z), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize(
    "hard",
    [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.functional.mse_loss, nn.BCEWithLogitsLoss()],
)
def test_no_loss_of_torchs_broadcasts_a_column(hard: Any) -> None:
    column = torch.zeros(6, 1)
    with pytest.raises(ObjectiveError, match="nothing is broadcast"):
        CollaborativeLoss(hard=hard)((column, column), torch.ones(6))


def test_a_regressions_own_loss_does_not_measure_the_consensus() -> None:
    z, y = some_logits(2, 6, 1), torch.ones(6, dtype=torch.float64)
    mine = CollaborativeLoss(task="regression", hard=lambda a, b: nn.functional.mse_loss(a.squeeze(1), b))
    assert_same(mine(z, y), CollaborativeLoss(task="regression")(z, y.unsqueeze(1)), z)


def test_a_large_head_costs_the_others_no_digits() -> None:
    z = [torch.full((1, 2), value) for value in (1e30, 1.0, 2.0)]
    assert torch.equal(consensus(z)[0], torch.full((1, 2), 1.5))


def test_a_further_peer_costs_mutual_learning_the_same() -> None:
    def operations(heads: int) -> int:
        with OperationCount() as count:
            MutualLoss()(some_logits(heads), some_indices()).backward()
        return sum(count.count.values())

    assert operations(8) - operations(4) == 2 * (operations(6) - operations(4))


@pytest.mark.parametrize("ensemble", ["naive", "min-logit", "mean"])
@pytest.mark.parametrize(
    "hard",
    [nn.CrossEntropyLoss(ignore_index=255), partial(partial(nn.functional.cross_entropy, ignore_index=255))],
    ids=["module", "function"],
)
def test_kdcl_learns_from_the_mean_where_there_is_no_label(ensemble: str, hard: Callable[..., Tensor]) -> None:
    z, y = some_logits(3, 2, CLASSES, 3), some_indices(2, 3)
    y[:, 1] = 255
    loss = KDCLLoss(ensemble, hard=hard, consensus_on="all")
    kept = [head[:, :, [0, 2]] for head in z]
    bare = [head[:, :, [1]] for head in z]
    expected = KDCLLoss(ensemble, reduction="sum")(kept, y[:, [0, 2]])
    hard = sum(nn.functional.cross_entropy(head, y[:, [0, 2]], reduction="sum") for head in kept)
    soft = (
        expected
        - hard
        + KDCLLoss("mean", hard=lambda a, b: 0 * a.sum(), task="classification", reduction="sum")(bare, y[:, [0]])
    )
    assert_same(loss(z, y), hard / 4 + soft / 6, z)
    assert torch.isfinite(KDCLLoss(ensemble)(some_logits(2), torch.tensor([0, -100, 1])))


def test_distillation_leaves_out_what_has_no_weight() -> None:
    [z, t] = some_logits(2)
    y = some_indices()
    assert torch.equal(DistillationLoss(beta=1)((z,), y), nn.functional.cross_entropy(z, y))
    ignored = torch.full((SAMPLES,), -100)
    assert torch.isfinite(DistillationLoss(beta=0)((z,), ignored, [t]))


def test_the_gate_takes_features_of_another_type() -> None:
    loss = ONELoss(features=6, heads=2)
    assert torch.isfinite(loss(some_logits(2), some_indices(), torch.randn(SAMPLES, 6, dtype=torch.float64)))


def test_make_fx_records_the_loss() -> None:
    z, y = some_logits(2), some_indices()
    graph = make_fx(lambda a, b: CollaborativeLoss()((a, b), y))(*z)
    torch.testing.assert_close(graph(*z), CollaborativeLoss()(z, y))


def test_an_objective_says_what_heads_learn() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Objective()  # type: ignore[abstract]


# --- What is refused ---

Outputs = namedtuple("Outputs", ["logits", "aux_logits"])
Z = torch.zeros(3, 4)
Y = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (lambda: MutualLoss(0), ["temperature must be finite and above 0"]),
        (lambda: MutualLoss(weight=-1), ["weight must be finite and at least 0, not -1"]),
        (lambda: KDCLLoss(weight=math.nan), ["weight must be finite and at least 0, not nan"]),
        (lambda: KDCLLoss("minlogit"), ["no ensemble 'minlogit'", "min-logit"]),
        (lambda: KDCLLoss(hard=nn.MSELoss()), ["made for classification, not for regression"]),
        (lambda: ONELoss(4, 2, temperature=-1), ["temperature must be finite and above 0"]),
        (lambda: DistillationLoss(beta=1.1), ["beta must be in [0, 1], not 1.1"]),
        (lambda: CollaborativeLoss(task="multilabel"), ["no task 'multilabel'", "multi-label"]),
        (lambda: CollaborativeLoss(hard=nn.NLLLoss()), ["not what NLLLoss takes", "nn.CrossEntropyLoss()"]),
        (lambda: CollaborativeLoss(hard=nn.BCELoss()), ["not what BCELoss takes", "nn.BCEWithLogitsLoss()"]),
        (lambda: CollaborativeLoss(hard=nn.functional.nll_loss), ["not what nll_loss takes"]),
        (lambda: CollaborativeLoss(hard=nn.KLDivLoss()), ["not what KLDivLoss takes"]),
        (
            lambda: CollaborativeLoss(hard=nn.PoissonNLLLoss()),
            ["The task of PoissonNLLLoss is ambiguous", "task='regression'"],
        ),
        (
            lambda: CollaborativeLoss(hard=nn.functional.cross_entropy, reduction="sum"),
            ["has reduction 'mean', the soft one 'sum'"],
        ),
        (
            lambda: CollaborativeLoss(hard=partial(nn.functional.mse_loss, reduction="sum")),
            ["has reduction 'sum', the soft one 'mean'"],
        ),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Objective], messages: list[str]) -> None:
    with pytest.raises(ObjectiveError) as caught:
        make()
    for message in messages:
        assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("loss", "arguments", "messages"),
    [
        pytest.param(MutualLoss(), [(Z,), Y], ["at least 2 heads, not 1"], id="mutual, one head"),
        pytest.param(KDCLLoss(), [(Z,), Y], ["at least 2 heads, not 1"], id="KDCL, one head"),
        pytest.param(
            KDCLLoss(),
            [(Z, Z), Z],
            ["class indices of shape (3,), the target is a tensor of shape (3, 4)", "argmax(1)"],
            id="KDCL, soft labels",
        ),
        pytest.param(ONELoss(4, 2), [(Z, Z), Y], ["tensor of features, not None", "forward hook"], id="ONE, bare"),
        pytest.param(ONELoss(4, 3), [(Z, Z), Y, Z], ["shape (3, 3) for 2 heads", "heads=2"], id="ONE, gate of 3"),
        pytest.param(DistillationLoss(), [(Z,), Y], ["one output per teacher"], id="no teacher"),
        pytest.param(DistillationLoss(), [(Z,), Y, [Z[:2]]], ["Teachers give (2, 4)"], id="teacher's batch"),
        pytest.param(
            CollaborativeLoss(task="multi-label"), [(Z, Z), Z.long()], ["target.float()"], id="integer labels"
        ),
        pytest.param(
            CollaborativeLoss(task="multi-label"), [(Z, Z), Y.float()], ["shape (3, 4)"], id="indices as labels"
        ),
        pytest.param(
            CollaborativeLoss(task="regression"),
            [(Z[:, :1], Z[:, :1]), Z[:, 0]],
            ["nothing is broadcast", "view_as"],
            id="a column of numbers",
        ),
        pytest.param(CollaborativeLoss(), [(Z[:, 0], Z[:, 0]), Y], ['task="multi-label"'], id="one logit a sample"),
        pytest.param(
            CollaborativeLoss(),
            [Outputs(Z, Z), Y],
            ["not a value of type Outputs", "named tuple is the output of one network", "(output,)"],
            id="a named tuple",
        ),
        pytest.param(CollaborativeLoss(), [(Z[:0], Z[:0]), Y[:0]], ["batch is empty"], id="empty batch"),
        pytest.param(CollaborativeLoss(), [(Z, Z), Y.to("meta")], ["target is on meta"], id="another device"),
        pytest.param(DistillationLoss(), [(Z,), Y, [Z * math.nan]], ["comes from a teacher"], id="NaN teacher"),
        pytest.param(DistillationLoss(), [(Z,), Y, [Z, Z[:2]]], ["teachers 0 and 1"], id="teachers differ"),
        pytest.param(ONELoss(4, 2), [(Z[:1], Z[:1]), Y[:1], Z[:1]], ["batch of one"], id="ONE, one sample"),
        pytest.param(ONELoss(5, 2), [(Z, Z), Y, Z], ["features (N, 5, ...)"], id="ONE, channels"),
        pytest.param(
            KDCLLoss(lambda heads, target: heads[0][:1]), [(Z, Z), Y], ["ensemble gave", "(3, 4)"], id="KDCL, shape"
        ),
    ],
)
def test_bad_input_is_refused(loss: Objective, arguments: list[Any], messages: list[str]) -> None:
    with pytest.raises(ObjectiveError) as caught:
        loss(*arguments)
    for message in messages:
        assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (lambda heads: sum(heads).mean(), "losses returned a tensor of shape ()"),
        (lambda heads: [heads[0].mean()], "losses returned 1 losses"),
        (lambda heads: [z.mean(1) for z in heads], "losses returned a tensor of shape (3,)"),
        (lambda heads: [z.median(0) for z in heads], "losses returned a value of type median"),
        (lambda heads: None, "losses returned None"),
    ],
)
def test_losses_that_are_not_one_for_each_head_are_refused(returned: Callable[[Any], Any], what: str) -> None:
    class Own(Objective):
        def losses(self, heads: list[Tensor], target: Any) -> Any:
            return returned(heads)

    for call in (Own(), Own().per_head):
        with pytest.raises(ObjectiveError) as caught:
            call(some_logits(2), some_indices())
        assert caught.value.what.startswith(what) and caught.value.where is not None
        assert "self.reduced(" in str(caught.value.hint)


def test_an_objective_of_ones_own_reduces_by_the_options() -> None:
    class Own(Objective):
        def losses(self, heads: list[Tensor], target: Any) -> list[Tensor]:
            return self.reduced([z.square().mean(1) for z in heads], self.counted(target, heads[0]))

    heads, target = some_logits(2), torch.tensor([1, -100, 2])
    each = Own(reduction="none")(heads, target)
    assert each.shape == (3,) and each[1] == 0
    torch.testing.assert_close(Own()(heads, target), each.sum() / 2)


class WithAuxiliary(nn.Module):
    """Its auxiliary output is computed in front of what may be a split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.tail = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.aux = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x).relu()
        return {"out": self.tail(self.middle(x)), "aux": self.aux(x)}


@pytest.mark.parametrize("objective", [CollaborativeLoss, MutualLoss, KDCLLoss])
def test_an_output_that_is_one_for_all_heads_is_warned_of(objective: Callable[..., Objective]) -> None:
    train_model = fxcollab.transform(WithAuxiliary, "simple", ["middle"], heads=3, seed=0)
    outputs, target = train_model(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert objective(logits="out")(outputs, target) > 0
    with pytest.warns(UserWarning, match="heads give the same logits, one tensor that is computed before the split"):
        objective(logits="aux")(outputs, target)
