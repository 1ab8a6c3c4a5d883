"""Heads across ranks beside all that torch shards: three steps in 2, 4 and 8 processes are those of one process."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fxcollab
from fxcollab.errors import FxCollabError
from fxcollab.plan import plan_of
from tests.processes import FOLDER, Jobs, Saved, saved_by

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
        if isinstance(module, nn.Linear) and not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh[over])
    return fully_shard(part, mesh=mesh[over])


def trunk_over_heads(part: Any, mesh: DeviceMesh) -> Any:
    fully_shard(part.get_submodule("a"), mesh=mesh["heads", "data"])
    return fsdp(part, mesh)


def tensor(part: Any, mesh: DeviceMesh) -> Any:
    columns = {name: ColwiseParallel(output_layouts=Replicate()) for name in "ab"}
    plan = fxcollab.parallel_plan(part, columns | {"c": RowwiseParallel(input_layouts=Replicate())})
    return parallelize_module(part, mesh["tensor"], plan)


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
    "four ranks, a head each": How("four", {"heads": 4}, micro=2),
    "four ranks, data": How("ladder", {"heads": 2, "data": 2}, ddp, clip=0.3),
    "four ranks, data, through the consensus": How("uneven", {"data": 2, "heads": 2}, ddp, detach=False),
    "four ranks, sharded": How("two by three", {"heads": 2, "data": 2}, fsdp, micro=2, clip=0.3),
    "four ranks, sharded, the trunk over heads too": How("four", {"heads": 2, "data": 2}, trunk_over_heads, clip=0.3),
    "four ranks, tensor": How("ladder", {"heads": 2, "tensor": 2}, tensor, clip=0.3),
    "two ranks": How("two", {"heads": 2}),
    "two ranks, accumulated and clipped": How("two by three", {"heads": 2}, micro=2, clip=0.3),
    "two ranks, computed again": How("ladder", {"heads": 2}, options={"recompute": "heads"}),
    "two ranks, compiled": How("uneven", {"heads": 2}, compiled, clip=0.3),
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
            torch.nn.utils.clip_grads_with_norm_(part.parameters(), how.clip, norm(), foreach=False)  # several meshes
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


def _composition(name: str, rank: int) -> Saved:
    how = COMPOSITIONS[name]
    mesh = mesh_of(how)
    part = fxcollab.spread(made(how.tree, **how.options), mesh)
    train(how, how.setup(part, mesh), part, shard_of(mesh), lambda: fxcollab.gradient_norm(part))
    yield "", fxcollab.gathered_state_dict(part)


def _checkpoints(rank: int) -> Saved:
    """Two steps with one layout of heads, from a checkpoint the third with another; the model starts on meta."""
    folder = Path(os.environ[FOLDER]) / "checkpoint"
    whole = {"full_state_dict": False, "flatten_optimizer_state_dict": True}
    for turn, (heads, steps) in enumerate(((4, slice(0, 2)), (2, slice(2, 3)))):
        mesh = init_device_mesh("cpu", (heads, RANKS // heads), mesh_dim_names=("heads", "data"))
        part = fxcollab.spread(made("four", "meta"), mesh)
        fsdp(part, mesh).to_empty(device="cpu")
        optimizer = torch.optim.Adam(part.parameters(), lr=0.01)
        options = StateDictOptions(**whole)
        if turn:
            state = {
                "model": part.state_dict(),
                "optimizer": get_optimizer_state_dict(part, optimizer, options=options),
            }
            dcp.load(state, checkpoint_id=folder)
            part.load_state_dict(state["model"])
            set_optimizer_state_dict(part, optimizer, state["optimizer"], options=options)
        else:  # an original's checkpoint, once for every head of this rank
            original = made("four").root.state_dict()
            dcp.save(original, checkpoint_id=folder / "original")
            for state in fxcollab.head_state_dicts(part):
                dcp.load(state, checkpoint_id=folder / "original")
        for ((x, y),) in batches()[steps]:
            optimizer.zero_grad()
            place, count = shard_of(mesh)
            fxcollab.CollaborativeLoss()(part(x.chunk(count)[place]), y.chunk(count)[place]).backward()
            optimizer.step()
        if not turn:
            state = {
                "model": part.state_dict(),
                "optimizer": get_optimizer_state_dict(part, optimizer, options=options),
            }
            dcp.save(state, checkpoint_id=folder)
    yield "", fxcollab.gathered_state_dict(part)


def _scaler(rank: int) -> Saved:
    """An overflow in one head alone: all ranks skip the step, and the next one counts."""
    mesh = init_device_mesh("cpu", (8,))
    part = fxcollab.spread(made("eight"), mesh)
    optimizer, scaler = torch.optim.SGD(part.parameters(), lr=0.1), ShardedGradScaler("cpu", init_scale=4.0)
    for step, ((x, y),) in enumerate(batches()[:2]):
        optimizer.zero_grad()
        scaler.scale(fxcollab.CollaborativeLoss(finite=False)(part(x), y)).backward()
        if step == 0 and rank == 5:
            next(p for name, p in part.named_parameters() if "b1_0_1.d" in name).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    yield "", (scaler.get_scale(), fxcollab.gathered_state_dict(part))


def _random(rank: int) -> Saved:
    """Dropout in the trunk, and ranks with one head and with two: masks of the trunk are the same."""
    torch.manual_seed(rank)
    part = fxcollab.spread(
        made("uneven", network=Dropped), init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "heads"))["heads"]
    )
    losses = []
    for ((x, y),) in batches():
        losses.append(fxcollab.CollaborativeLoss()(part(x), y).detach())
        torch.rand(rank + 1)
    yield "", torch.stack(losses)


def _guards(rank: int) -> Saved:
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("data", "heads"))
    place, loss = mesh["heads"].get_local_rank(), fxcollab.CollaborativeLoss()
    ((x, y),) = batches()[0]
    errors = []

    def step(part: Any, x: Tensor, y: Tensor) -> None:
        try:
            loss(part(x), y).backward()
            errors.append("")
        except FxCollabError as error:
            errors.append(str(error))

    part = fxcollab.spread(made("two"), mesh["heads"])
    step(part, x, y)
    step(part, x.roll(place, 0), y)
    step(part, x, (y + place) % 5)
    with torch.no_grad():
        part.get_parameter("a.weight").add_(place)
    step(part, x, y)
    fxcollab.align(part)
    step(part, x, y)
    part = fxcollab.spread(made("two"), mesh, check_every=2)
    step(part, x, y)
    step(part, x.roll(place, 0), y)
    step(part, x.roll(place, 0), y)
    sharded = fsdp(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)), mesh)
    for model in (sharded, DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)))):
        try:
            fxcollab.transform(model, "simple", ["0"])
        except FxCollabError as error:
            errors.append(str(error))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        DistributedDataParallel(fxcollab.spread(made("two"), mesh))(x)  # over all ranks
    yield "", (errors, [str(warning.message) for warning in told if "same outputs" in str(warning.message)])


def _proof(rank: int) -> Saved:
    """A recipe that is right, and one that leaves data parallelism out."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("heads", "data"))
    x = batches()[0][0][0].chunk(2)[mesh["data"].get_local_rank()]
    model = made("four")
    right = ddp(fxcollab.spread(made("four"), mesh), mesh)
    wrong = fxcollab.spread(made("four"), mesh)
    yield (
        "",
        [(bool(report), str(report)) for report in (fxcollab.verify(model, part, (x,)) for part in (right, wrong))],
    )


def _dead(rank: int) -> Saved:
    """Comes last: one process ends between two steps."""
    part = fxcollab.spread(made("eight"))
    ((x, y),) = batches()[0]
    fxcollab.CollaborativeLoss()(part(x), y).backward()
    if rank == 3:
        yield "", "doesn't answer: this one"
        os._exit(0)
    try:
        fxcollab.CollaborativeLoss()(part(x), y).backward()
    except FxCollabError as error:
        yield "", str(error)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What the jobs below saved, rank by rank, by name; those of so many processes run together, once."""
    saved: dict[int, Callable[[str], list[Any]]] = {}

    def of(name: str) -> list[Any]:
        ranks = ranks_of(name)
        if ranks not in saved:
            jobs = {each: job for each, job in JOBS.items() if ranks_of(each) == ranks}
            saved[ranks] = saved_by(jobs, ranks, tmp_path_factory.mktemp(f"{ranks}_processes"))
        return saved[ranks](name)

    return of


def ranks_of(name: str) -> int:
    return math.prod(COMPOSITIONS[name].mesh.values()) if name in COMPOSITIONS else RANKS


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
    for state in results(name):
        assert list(state) == list(expected.state_dict())
        for key, value in expected.state_dict().items():
            assert_close(state[key], value, **SMALL, msg=lambda text, key=key: f"{key}: {text}")
        for head in range(plan_of(expected).tree.heads):
            pruned = fxcollab.prune_state_dict(state, head)
            Net().double().load_state_dict(pruned, strict=True)


def test_a_run_starts_on_meta_from_an_originals_checkpoint_and_goes_on_with_another_layout(
    results: Callable[[str], list[Any]],
) -> None:
    model = made("four", init="copy-anyway")
    train(How("four", {}), model, model, (0, 1), lambda: torch.zeros(()))
    for state in results("checkpoints"):
        for key, value in model.state_dict().items():
            assert_close(state[key], value, **SMALL, msg=lambda text, key=key: f"{key}: {text}")


def test_an_overflow_in_one_head_skips_the_step_on_all_ranks(results: Callable[[str], list[Any]]) -> None:
    model = made("eight")
    ((x, y),) = batches()[1]
    fxcollab.CollaborativeLoss()(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for scale, state in results("scaler"):
        assert scale == 2.0
        for key, value in model.state_dict().items():
            assert_close(state[key], value, **SMALL, msg=key)


def test_what_ranks_share_draws_the_same_random_numbers(results: Callable[[str], list[Any]]) -> None:
    rows = torch.stack(results("random")).view(2, 4, STEPS)
    assert (rows == rows[:, :1]).all() and not torch.equal(rows[0], rows[1])


def test_ranks_that_go_apart_are_told(results: Callable[[str], list[Any]]) -> None:
    for errors, told in results("guards"):
        assert len(told) == 1
        assert [error.split("\n")[0].partition("got ")[2] for error in errors[:8]] == [
            "", "different batches.", "different gradients of the loss.",
            "different values of the layers that they share.", "", "", "", "different batches.",
        ]  # fmt: skip
        assert len(errors) == 10 and all("transform first" in error for error in errors[8:])


def test_the_proof_across_ranks_tells_a_recipe_that_is_right_from_one_that_is_not(
    results: Callable[[str], list[Any]],
) -> None:
    for (right, said), (wrong, _) in results("proof"):
        assert right, said
        assert not wrong


def test_a_rank_that_ends_is_told_to_the_others(results: Callable[[str], list[Any]]) -> None:
    assert all("doesn't answer" in error for error in results("dead"))


JOBS: Jobs = {name: partial(_composition, name) for name in COMPOSITIONS} | {
    "checkpoints": _checkpoints,
    "scaler": _scaler,
    "random": _random,
    "guards": _guards,
    "proof": _proof,
    "dead": _dead,
}
