"""Heads over the ranks of torch.distributed: gradients, statistics and checkpoints are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import fxcollab
from fxcollab.distributed.ranks import heads_of
from fxcollab.errors import FxCollabError, StateError
from fxcollab.plan import plan_of
from tests.processes import Jobs, Saved, saved_by
from tests.references import SkipNet, SmallConvNet

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(8) % 5


class Tied(nn.Module):
    """Its first weight is its last: the trunk's, used behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(432, 5), nn.Linear(5, 432), nn.Linear(432, 5)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x.flatten(1))))))


class Nested(SmallConvNet):
    """Returns a dict, with a value that carries no gradient."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"logits": logits, "best": logits.argmax(1)}


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "one head a rank": (SmallConvNet, {"splits": ["layer1", "layer2"]}, 4),
    "two heads a rank": (SkipNet, {"splits": ["layer1", "layer2"]}, 2),
    "six heads on two ranks": (SkipNet, {"splits": ["layer1", "layer2"], "fanouts": (3, 2)}, 2),
    "simple": (SmallConvNet, {"pattern": "simple", "splits": ["layer2"], "heads": 4}, 4),
    "instances": (SmallConvNet, {"pattern": "multi-instance", "heads": 2}, 2),
    "no rescale": (SmallConvNet, {"splits": ["layer1", "layer2"], "rescale": False}, 4),
    "computed again": (SmallConvNet, {"splits": ["layer1", "layer2"], "recompute": "heads"}, 2),
    "tied": (Tied, {"pattern": "simple", "splits": ["first"], "heads": 2}, 2),
    "tied, no rescale": (Tied, {"pattern": "simple", "splits": ["first"], "heads": 2, "rescale": False}, 2),
    "head 0 frozen": (SmallConvNet, {"pattern": "simple", "splits": ["layer2"], "heads": 2}, 2),
    "an uneven tree": (SmallConvNet, {"splits": ["layer1", "layer2"], "fanouts": (2, (2, 1))}, 2),
    "a ladder on four ranks": (SkipNet, {"pattern": "ladder", "splits": ["conv1", "layer1", "layer2"]}, 4),
    "five heads on four ranks": (SmallConvNet, {"splits": ["layer1", "layer2"], "fanouts": (3, (1, 3, 1))}, 4),
    "five heads computed again": (
        SkipNet,
        {"splits": ["layer1", "layer2"], "fanouts": (3, (1, 3, 1)), "recompute": "heads"},
        2,
    ),
    "nested, three heads": (Nested, {"pattern": "simple", "splits": ["layer1"], "heads": 3}, 2),
    "nested": (Nested, {"pattern": "simple", "splits": ["layer1"], "heads": 2}, 2),
}


def made(case: str) -> fxcollab.CollabGraphModule:
    factory, options, _ = CASES[case]
    torch.manual_seed(0)
    model = fxcollab.transform(factory().double(), seed=1, **options)
    if case == "head 0 frozen":
        model.root.requires_grad_(False)
    return model


def loss_of(case: str, outputs: Any, labels: Tensor = LABELS) -> Tensor:
    return fxcollab.CollaborativeLoss(logits="logits" if case.startswith("nested") else None, detach=False)(
        outputs, labels
    )


def step(case: str, model: nn.Module, x: Tensor = X, labels: Tensor = LABELS) -> Tensor:
    loss = loss_of(case, model(x), labels)
    loss.backward()
    return loss.detach()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and buffers by name."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


# ---------------------------------------------------------------------------------------------- four processes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What the jobs below saved, rank by rank, by name."""
    return saved_by(JOBS, 4, tmp_path_factory.mktemp("four_processes"))


def _mesh(heads: int) -> Any:
    """Four ranks: as many for heads, the others for data."""
    if heads == 4:
        return init_device_mesh("cpu", (4,))
    return init_device_mesh("cpu", (4 // heads, heads), mesh_dim_names=("data", "heads"))


def _spread_cases(rank: int) -> Saved:
    """Without data parallelism: the rows see the same batch."""
    for case, (_, _, places) in CASES.items():
        part = fxcollab.spread(made(case), _mesh(places))
        part.load_state_dict(part.state_dict())
        step(case, part)
        yield f"{case} accumulated once", state_of(part)
        loss = step(case, part)
        state = fxcollab.gathered_state_dict(part)
        yield case, (loss, state_of(part), state, fxcollab.gradient_norm(part), list(part.state_dict()))


def _spread_data(rank: int) -> Saved:
    """Two rows of two ranks, each row with half of the batch."""
    case = "tied"
    mesh = _mesh(2)
    part = fxcollab.spread(made(case), mesh)
    half = slice(4 * mesh["data"].get_local_rank(), 4 * mesh["data"].get_local_rank() + 4)
    step(case, DistributedDataParallel(part, process_group=mesh["data"].get_group()), X[half], LABELS[half])
    yield "halves", state_of(part)


def _train(rank: int) -> Saved:
    torch.manual_seed(rank)
    model = fxcollab.transform(SmallConvNet().double(), splits=["layer1", "layer2"], seed=rank)  # each its own
    part = fxcollab.spread(model)
    optimizer = torch.optim.SGD(part.parameters(), 0.1, momentum=0.9)
    average = AveragedModel(part, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(step("one head a rank", part))
        torch.nn.utils.clip_grads_with_norm_(part.parameters(), 1.0, fxcollab.gradient_norm(part))
        optimizer.step()
        average.update_parameters(part)
    yield "average", average.state_dict()
    yield "trained", (torch.stack(losses), state_of(part), fxcollab.gathered_state_dict(part))


def _gather(rank: int) -> Saved:
    part = fxcollab.spread(made("simple"))
    with torch.no_grad():
        part.get_parameter("conv1.weight").add_(rank)  # nothing that training does
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    gathered = fxcollab.gathered_state_dict(part)
    own = {tensor.data_ptr() for tensor in part.state_dict().values()}
    shared = [name for name, tensor in gathered.items() if tensor.numel() and tensor.data_ptr() in own]
    yield "kept", (before, part.state_dict(), shared)


def _refuse(rank: int) -> Saved:
    found = []
    attempts: list[Callable[[], object]] = [
        lambda: fxcollab.spread(made("instances"), _mesh(4)),
        lambda: fxcollab.spread(made("simple"), init_device_mesh("cpu", (2, 2))),
        lambda: step("simple", fxcollab.spread(made("simple"), _mesh(4)), X + rank),
        lambda: step("simple", fxcollab.spread(made("simple"), _mesh(4)), X if rank else X * float("nan")),
        lambda: fxcollab.gathered_state_dict(made("simple")),
        lambda: fxcollab.prune(fxcollab.spread(made("simple"), _mesh(4))),
    ]
    for attempt in attempts:
        try:
            attempt()
        except FxCollabError as error:
            found.append((type(error).__name__, str(error)))
    yield "errors", found


JOBS: Jobs = {
    "cases": _spread_cases,
    "data": _spread_data,
    "train": _train,
    "gather": _gather,
    "refuse": _refuse,
}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_the_gradients_and_statistics_of_one_process(
    case: str, results: Callable[[str], list[Any]]
) -> None:
    whole = made(case)
    step(case, whole)
    expected = state_of(whole)
    parts = results(f"cases/{case} accumulated once")
    assert len(parts) == 4
    for found in parts:
        for name, value in found.items():
            assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert set().union(*parts) == expected.keys()


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_several_backwards_add_up(case: str, results: Callable[[str], list[Any]]) -> None:
    whole = made(case)
    step(case, whole)
    expected_loss = step(case, whole)
    expected = state_of(whole)
    for loss, found, _, _, _ in results(f"cases/{case}"):
        assert_close(loss, expected_loss)
        for name, value in found.items():
            assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_the_gathered_state_is_that_of_the_whole_and_prunes(case: str, results: Callable[[str], list[Any]]) -> None:
    whole = made(case)
    step(case, whole), step(case, whole)
    expected = whole.state_dict()
    for _, _, state, _, own in results(f"cases/{case}"):
        assert list(state) == list(expected)
        for name, value in expected.items():
            assert_close(state[name], value)
        assert set(own) < set(expected)  # a rank holds a part
    original = CASES[case][0]().double()
    for head in range(plan_of(whole).tree.heads):
        original.load_state_dict(fxcollab.prune_state_dict(state, head), strict=True)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_the_norm_of_all_gradients_counts_each_once(case: str, results: Callable[[str], list[Any]]) -> None:
    whole = made(case)
    step(case, whole), step(case, whole)
    expected = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
    for _, _, _, norm, _ in results(f"cases/{case}"):
        assert_close(norm, expected)


@pytest.mark.dist
def test_gathering_leaves_the_parts_as_they_are(results: Callable[[str], list[Any]]) -> None:
    for before, after, shared in results("gather/kept"):
        assert not shared  # a copy on every rank, also on the one that owns the tensor
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.dist
def test_rows_with_other_batches_take_the_mean(results: Callable[[str], list[Any]]) -> None:
    whole = made("tied")
    step("tied", whole)
    expected = state_of(whole)
    for found in results("data/halves"):
        for name, value in found.items():
            assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.dist
def test_training_lowers_the_loss_and_keeps_ranks_together(results: Callable[[str], list[Any]]) -> None:
    ranks = results("train/trained")
    first, found, state = ranks[0]
    assert first[-1] < first[0]
    for losses, other, other_state in ranks[1:]:
        assert_close(losses, first)
        for name in found.keys() & other.keys():
            assert_close(other[name], found[name])
        for name, value in state.items():
            assert_close(other_state[name], value)
    SmallConvNet().double().load_state_dict(fxcollab.prune_state_dict(state, 3), strict=True)


@pytest.mark.dist
def test_averages_of_the_weights_stay_together(results: Callable[[str], list[Any]]) -> None:
    first, *others = results("train/average")
    for other in others:
        for name in first.keys() & other.keys():
            assert_close(other[name], first[name])


@pytest.mark.dist
def test_what_cannot_be_spread_is_refused(results: Callable[[str], list[Any]]) -> None:
    for errors in results("refuse/errors"):
        assert [name for name, _ in errors] == [
            "PatternError",
            "PatternError",
            *["StateError"] * 4,
        ]
        assert "2 heads can't be distributed over 4 ranks" in errors[0][1]
        assert "heads" in errors[1][1]
        assert "different batches" in errors[2][1] and "different batches" in errors[3][1]
        assert "fxcollab.spread made" in errors[5][1]


# ---------------------------------------------------------------------------------------------- one process


def test_without_ranks_it_is_refused() -> None:
    with pytest.raises(StateError, match="no ranks"):
        fxcollab.spread(made("simple"))


def test_heads_are_shared_evenly_and_neighbours_stay_together() -> None:
    tree = fxcollab.HeadTree(("a", "b"), (2, 3))
    assert [list(heads_of(tree, 3, place)) for place in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [list(heads_of(tree, 4, place)) for place in range(4)] == [[0], [1, 2], [3], [4, 5]]
