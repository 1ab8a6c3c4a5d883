"""One run of two processes: gradients under DDP, FSDP2 and heads across ranks are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fxcollab
from tests.processes import Jobs, Saved, saved_by
from tests.training_helpers import Mlp, assert_same_gradients, gradients, mlp, mlp_batch


def _half(rank: int) -> tuple[Tensor, Tensor]:
    x, target = mlp_batch()
    return x[4 * rank : 4 * rank + 4], target[4 * rank : 4 * rank + 4]


def _step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    loss = fxcollab.CollaborativeLoss()(model(x), target)
    loss.backward()
    return loss.detach()


def _under_ddp(rank: int) -> Saved:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    _step(wrapped, *_half(rank))
    yield "", ({name: p.grad for name, p in model.named_parameters()}, wrapped.state_dict())


def _under_fsdp(rank: int) -> Saved:
    model = mlp()
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _step(model, *_half(rank))
    yield "", {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def _across_ranks(rank: int) -> Saved:
    part = fxcollab.spread(mlp())
    loss = _step(part, *mlp_batch())
    own = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
    yield "", (loss, own, fxcollab.gathered_state_dict(part), fxcollab.gradient_norm(part))


JOBS: Jobs = {"ddp": _under_ddp, "fsdp": _under_fsdp, "ranks": _across_ranks}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What each of the two processes saved, by the job's name."""
    return saved_by(JOBS, 2, tmp_path_factory.mktemp("two_processes"))


@pytest.fixture
def expected() -> dict[str, Tensor]:
    """The gradients of one process on the whole batch."""
    twin = mlp()
    return gradients(twin, twin, mlp_batch())


def test_gradients_under_ddp_are_those_of_one_process(
    results: Callable[[str], list[Any]], expected: dict[str, Tensor]
) -> None:
    for found, _ in results("ddp"):
        assert_same_gradients(found, expected)


def test_a_checkpoint_from_under_ddp_prunes_to_every_head_of_the_original(
    results: Callable[[str], list[Any]],
) -> None:
    train_model, original = mlp(), Mlp().double()
    _, state = results("ddp")[0]
    for head in range(6):
        original.load_state_dict(fxcollab.prune_state_dict(state, head), strict=True)
        for name, value in fxcollab.prune_state_dict(train_model.state_dict(), head).items():
            assert torch.equal(original.state_dict()[name], value), name


def test_gradients_under_fsdp2_are_those_of_one_process(
    results: Callable[[str], list[Any]], expected: dict[str, Tensor]
) -> None:
    for found in results("fsdp"):
        assert_same_gradients(found, expected)


def test_heads_across_ranks_have_the_gradients_and_the_state_of_one_process(
    results: Callable[[str], list[Any]], expected: dict[str, Tensor]
) -> None:
    train_model = mlp()
    loss = fxcollab.CollaborativeLoss()(train_model(mlp_batch()[0]), mlp_batch()[1])
    parts = []
    for found_loss, own, state, norm in results("ranks"):
        assert_close(found_loss, loss.detach())
        assert_same_gradients(own, {name: expected[name] for name in own})
        assert 0 < len(own) < len(expected)
        assert list(state) == list(train_model.state_dict())
        assert all(torch.equal(state[name], value) for name, value in train_model.state_dict().items())
        assert_close(norm, torch.nn.utils.get_total_norm(list(expected.values())))
        parts.append(own)
    assert set().union(*parts) == expected.keys()
