"""Training models under DDP and FSDP2, in two processes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fxcollab
from fxcollab.codegen.branches import Recompute
from tests.processes import Jobs, Saved, saved_by
from tests.references import SkipNet, SmallConvNet
from tests.training_helpers import CLASSES, Mlp, assert_same_gradients, batch, gradients, mlp, mlp_batch, train

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What the jobs below saved in the first of two processes, by name."""
    load = saved_by(JOBS, 2, tmp_path_factory.mktemp("two_processes"))
    return lambda name: load(name)[0]


def _half(rank: int) -> tuple[Tensor, Tensor]:
    x, target = mlp_batch()
    return x[4 * rank : 4 * rank + 4], target[4 * rank : 4 * rank + 4]


WRAPPINGS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": DistributedDataParallel,
    "around compile": lambda model: DistributedDataParallel(
        torch.compile(model, fullgraph=True, backend="aot_eager")
    ),
    "inside compile": lambda model: torch.compile(DistributedDataParallel(model), backend="aot_eager"),
    "static graph": lambda model: DistributedDataParallel(model, static_graph=True),
}


RECOMPUTE: dict[str, Recompute | None] = {"kept": None, "again": "heads"}


def _train_under_ddp(rank: int) -> Saved:
    for name, how in product(WRAPPINGS, RECOMPUTE):
        wrap, model = WRAPPINGS[name], mlp(RECOMPUTE[how])
        wrapped = wrap(model)
        x, target = _half(rank)
        fxcollab.CollaborativeLoss()(wrapped(x), target).backward()
        found = {key: p.grad for key, p in model.named_parameters()}
        torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
        yield f"{name} {how}", (found, wrapped.state_dict(), model.state_dict())


@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_ddp_gradients_equal_one_process_on_the_joined_batch(
    wrapping: str, how: str, results: Callable[[str], Any]
) -> None:
    twin = mlp()
    found, _, _ = results(f"ddp/{wrapping} {how}")
    assert_same_gradients(found, gradients(twin, twin, mlp_batch()))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_from_under_ddp_prune_to_what_the_original_loads(
    wrapping: str, results: Callable[[str], Any]
) -> None:
    _, wrapped_state, plain_state = results(f"ddp/{wrapping} kept")
    original = Mlp().double()
    assert list(wrapped_state) != list(plain_state)
    for head in range(6):
        pruned = fxcollab.prune_state_dict(wrapped_state, head)
        original.load_state_dict(pruned, strict=True)
        plain = fxcollab.prune_state_dict(plain_state, head)
        assert list(pruned) == list(plain) == list(original.state_dict())
        assert all(torch.equal(pruned[key], plain[key]) for key in plain)


class Tied(nn.Module):
    """Its first weight is its last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(self.embed(tokens))))


def _tied() -> fxcollab.CollabGraphModule:
    torch.manual_seed(0)
    return fxcollab.transform(Tied().double(), "simple", ["embed"], heads=3, seed=1)


def _tied_batch(samples: slice = slice(0, 8)) -> tuple[Tensor, Tensor]:
    return (torch.arange(8) * 3 % CLASSES)[samples], (torch.arange(8) % CLASSES)[samples]


def _train_tied_under_ddp(rank: int) -> Saved:
    model = _tied()
    wrapped = DistributedDataParallel(model)
    tokens, target = _tied_batch(slice(4 * rank, 4 * rank + 4))
    fxcollab.CollaborativeLoss()(wrapped(tokens), target).backward()
    yield "", {name: p.grad for name, p in model.named_parameters()}


def test_ddp_gradients_of_tied_weights(results: Callable[[str], Any]) -> None:
    twin = _tied()
    assert_same_gradients(results("tied"), gradients(twin, twin, _tied_batch()))


UNLABELLED = {"none": lambda y: None, "all ignored": lambda y: torch.full_like(y, -100)}


def _train_beside_a_batch_without_labels(rank: int) -> Saved:
    """The second process has no labels."""
    for name, unlabelled in UNLABELLED.items():
        model, (x, target) = mlp(), _half(rank)
        wrapped, loss = DistributedDataParallel(model), fxcollab.CollaborativeLoss(consensus_on="all")
        loss(wrapped(x), unlabelled(target) if rank else target).backward()
        yield name, {key: p.grad for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", UNLABELLED)
def test_a_batch_without_labels_trains_beside_one_with_labels(name: str, results: Callable[[str], Any]) -> None:
    twin, loss = mlp(), fxcollab.CollaborativeLoss()
    (x, target), (others, _) = _half(0), _half(1)
    ((loss(twin(x), target) + loss(twin(others), None)) / 2).backward()
    assert_same_gradients(results(f"without labels/{name}"), {key: p.grad for key, p in twin.named_parameters()})


def _train_batch_norm_under_ddp(rank: int) -> Saved:
    torch.manual_seed(rank)  # of two processes that start apart, DDP takes the first one's weights
    model = fxcollab.transform(SkipNet, splits=["layer1", "layer2"], seed=rank)
    wrapped = DistributedDataParallel(model)
    x, target = batch()
    half = slice(5 * rank, 5 * rank + 5)
    losses = train(wrapped, wrapped.parameters(), steps=6, data=(x[half], target[half]))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    yield "", (losses, both, fxcollab.prune(wrapped, 3).state_dict())


def test_training_under_ddp_lowers_the_loss_and_keeps_processes_together(
    results: Callable[[str], Any],
) -> None:
    losses, weights, pruned = results("batch norm")
    assert losses[-1] < losses[0]
    assert torch.equal(*weights)
    SkipNet().load_state_dict(pruned, strict=True)


def _train_under_fsdp(rank: int) -> Saved:
    mesh = dist.init_device_mesh("cpu", (2,))
    for how, recompute in RECOMPUTE.items():
        yield how, _step_under_fsdp(rank, mesh, mlp(recompute))


def _step_under_fsdp(rank: int, mesh: DeviceMesh, model: fxcollab.CollabGraphModule) -> Any:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    x, target = _half(rank)
    total = fxcollab.CollaborativeLoss()(model(x), target)
    total.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return total.detach(), found, whole


@pytest.mark.parametrize("how", RECOMPUTE)
def test_fsdp2_gradients_equal_one_process_on_the_joined_batch(how: str, results: Callable[[str], Any]) -> None:
    total, found, state = results(f"fsdp/{how}")
    assert total.isfinite()
    twin = mlp()
    expected = gradients(twin, twin, mlp_batch())
    assert_same_gradients(found, expected)
    original = Mlp().double()
    for head in range(6):
        original.load_state_dict(fxcollab.prune_state_dict(state, head), strict=True)
    for name, p in twin.named_parameters():
        assert_close(state[name], p.detach() - 0.1 * expected[name], rtol=1e-9, atol=1e-12, msg=name)


def _stages(recompute: Recompute | None = None) -> fxcollab.CollabGraphModule:
    torch.manual_seed(0)
    return fxcollab.transform(SmallConvNet().double(), splits=["layer1", "layer2"], seed=1, recompute=recompute)


def _stages_batch() -> tuple[Tensor, Tensor]:
    x, target = batch()
    return x.double(), target


def _recompute_under_fsdp(rank: int) -> Saved:
    """Stages with statistics, each sharded by itself; both processes see the whole batch."""
    model = _stages("heads")
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, target = _stages_batch()
    for _ in range(2):
        model.zero_grad()
        fxcollab.CollaborativeLoss()(model(x), target).backward()
    yield "", {name: p.grad.full_tensor() for name, p in model.named_parameters()} | dict(model.named_buffers())


def test_stages_with_statistics_are_computed_again_under_fsdp2(results: Callable[[str], Any]) -> None:
    plain = _stages()
    x, target = _stages_batch()
    for _ in range(2):
        plain.zero_grad()
        fxcollab.CollaborativeLoss()(plain(x), target).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()} | dict(plain.named_buffers())
    found = results("recompute under fsdp")
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


JOBS: Jobs = {
    "ddp": _train_under_ddp,
    "tied": _train_tied_under_ddp,
    "without labels": _train_beside_a_batch_without_labels,
    "batch norm": _train_batch_norm_under_ddp,
    "fsdp": _train_under_fsdp,
    "recompute under fsdp": _recompute_under_fsdp,
}
