"""Heads across ranks beside all that torch shards: three steps in eight processes are those of one process."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fxcollab
from fxcollab.errors import FxCollabError
from fxcollab.plan import plan_of
from tests.processes import Jobs, Saved, saved_by

pytestmark = pytest.mark.dist

STEPS, RANKS = 3, 8
SMALL = {"rtol": 1e-12, "atol": 1e-12}


class Net(nn.Module):
    """Layers by name; the first value is also read behind all splits, and by the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.a(x))
        third = torch.tanh(self.c(torch.tanh(self.b(first)))) + first
        return self.out(torch.tanh(self.d(third))) + first[:, :5]


class Dropped(Net):
    """Draws random numbers in the trunk."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


TREES: dict[str, dict[str, Any]] = {
    "two": {"pattern": "simple", "splits": ["a"], "heads": 2},
    "four": {"splits": ["a", "b"]},
    "eight": {"splits": ["a", "b", "c"]},
    "two by three": {"splits": ["a", "b"], "fanouts": (2, 3)},
    "ladder": {"pattern": "ladder", "splits": ["a", "b", "c"]},
    "uneven": {"splits": ["a", "b"], "fanouts": (3, (1, 3, 1))},
    "unscaled": {"splits": ["a", "b"], "rescale": False},
}


def made(tree: str, device: str = "cpu", network: Callable[[], nn.Module] = Net, **options: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = network().double()
    return fxcollab.transform(model, seed=1, **TREES[tree], **options)


def batches(micro: int = 1) -> list[list[tuple[Tensor, Tensor]]]:
    """For each step the batches whose gradients are accumulated."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(STEPS, micro, 16, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(5, (STEPS, micro, 16), generator=generator)
    return [[(x[step, part], y[step, part]) for part in range(micro)] for step in range(STEPS)]


class How(NamedTuple):
    """How a model is trained: its options, and on the ranks a mesh and what is done to the part on it."""

    tree: str
    mesh: dict[str, int]
    setup: Callable[[Any, DeviceMesh], Any] = lambda part, mesh: part
    micro: int = 1
    clip: float | None = None
    detach: bool = True
    options: dict[str, Any] = {}  # noqa: RUF012


def ddp(part: Any, mesh: DeviceMesh) -> Any:
    return DistributedDataParallel(part, process_group=mesh["data"].get_group())


def fsdp(part: Any, mesh: DeviceMesh, over: str | tuple[str, ...] = "data") -> Any:
    for module in list(part.modules()):
        if isinstance(module, nn.Linear) and not isinstance(module, fully_sharded()):
            fully_shard(module, mesh=mesh[over])
    return fully_shard(part, mesh=mesh[over])


def fully_sharded() -> type:
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule


def trunk_over_heads(part: Any, mesh: DeviceMesh) -> Any:
    fully_shard(part.get_submodule("a"), mesh=mesh["heads", "data"])
    return fsdp(part, mesh)


def tensor(part: Any, mesh: DeviceMesh) -> Any:
    plan = {"b": ColwiseParallel(), "c": RowwiseParallel(), "a": ColwiseParallel(output_layouts=replicated())}
    return parallelize_module(part, mesh["tensor"], fxcollab.parallel_plan(part, plan | {"b": whole_columns()}))


def replicated() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def whole_columns() -> Any:
    return ColwiseParallel(output_layouts=replicated())


def compiled(part: Any, mesh: DeviceMesh) -> Any:
    return torch.compile(part, backend="aot_eager", fullgraph=True)


COMPOSITIONS: dict[str, How] = {
    "alone, a head a rank": How("eight", {"heads": 8}),
    "data": How("ladder", {"heads": 4, "data": 2}, ddp),
    "data, accumulated and clipped": How("two by three", {"data": 2, "heads": 4}, ddp, micro=2, clip=0.3),
    "data, uneven, through the consensus": How("uneven", {"heads": 4, "data": 2}, ddp, detach=False),
    "data, no rescale": How("unscaled", {"data": 4, "heads": 2}, ddp),
    "data, compiled": How("four", {"heads": 4, "data": 2}, lambda part, mesh: ddp(compiled(part, mesh), mesh)),
    "sharded": How("two by three", {"heads": 4, "data": 2}, fsdp, clip=0.3),
    "sharded, computed again": How("four", {"heads": 2, "data": 4}, fsdp, micro=2, options={"recompute": "heads"}),
    "sharded, the trunk over heads too": How("four", {"heads": 4, "data": 2}, trunk_over_heads, clip=0.3),
    "sharded and replicated": How(
        "two",
        {"heads": 2, "data": 2, "shard": 2},
        lambda part, mesh: fsdp(part, mesh, ("data", "shard")),
    ),
    "tensor": How("ladder", {"heads": 4, "tensor": 2}, tensor, clip=0.3),
    "tensor and sharded": How(
        "four", {"heads": 2, "data": 2, "tensor": 2}, lambda part, mesh: fsdp(tensor(part, mesh), mesh), clip=0.3
    ),
}


def mesh_of(how: How) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(how.mesh.values()), mesh_dim_names=tuple(how.mesh))


def train(how: How, model: Any, part: Any, shard: tuple[int, int], norm: Callable[[], Tensor]) -> list[Tensor]:
    """Train on this shard of all batches; the losses."""
    loss, losses = fxcollab.CollaborativeLoss(detach=how.detach), []
    optimizer = torch.optim.Adam(part.parameters(), lr=0.01)
    for micros in batches(how.micro):
        optimizer.zero_grad()
        for x, y in micros:
            total = loss(model(x.chunk(shard[1])[shard[0]]), y.chunk(shard[1])[shard[0]]) / how.micro
            total.backward()
            losses.append(total.detach())
        if how.clip:
            torch.nn.utils.clip_grads_with_norm_(part.parameters(), how.clip, norm())
        optimizer.step()
    return losses


def shard_of(mesh: DeviceMesh) -> tuple[int, int]:
    """Which part of a batch this rank's row has, of how many."""
    names = [name for name in ("data", "shard") if name in (mesh.mesh_dim_names or ())]
    sizes = [mesh[name].size() for name in names]
    place = 0
    for name, size in zip(names, sizes, strict=True):
        place = place * size + mesh[name].get_local_rank()
    return place, torch.tensor(sizes).prod().long().item() if sizes else 1


def _compositions(rank: int) -> Saved:
    for name, how in COMPOSITIONS.items():
        mesh = mesh_of(how)
        part = fxcollab.spread(made(how.tree, **how.options), mesh)
        train(how, how.setup(part, mesh), part, shard_of(mesh), lambda part=part: fxcollab.gradient_norm(part))
        yield name, fxcollab.gathered_state_dict(part)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What the jobs below saved, rank by rank, by name."""
    return saved_by(JOBS, RANKS, tmp_path_factory.mktemp("eight_processes"))


def trained(how: How) -> Any:
    """The whole model, trained in one process."""
    model = made(how.tree)
    train(how, model, model, (0, 1), lambda: torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    return model


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_three_steps_are_those_of_one_process_and_every_head_prunes(
    name: str, results: Callable[[str], list[Any]]
) -> None:
    expected = trained(COMPOSITIONS[name])
    for state in results(f"compositions/{name}"):
        assert list(state) == list(expected.state_dict())
        for key, value in expected.state_dict().items():
            assert_close(state[key], value, **SMALL, msg=lambda text, key=key: f"{key}: {text}")
        for head in range(plan_of(expected).tree.heads):
            pruned = fxcollab.prune_state_dict(state, head)
            Net().double().load_state_dict(pruned, strict=True)


JOBS: Jobs = {"compositions": _compositions}
