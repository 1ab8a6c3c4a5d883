"""Heads on two ranks against the single network: ``python -m tests.benchmarks.heads_on_ranks [ResNet-32 ...]``.

On a machine with GPUs it runs there: with NCCL where there are two, by gloo where there is one, and then also shows
that SyncBatchNorm over data gives the statistics of the joined batch. For each network: the slower rank's step over
the single network's, taken in turns in both ranks at once; the cost of the checks of every step; what a step of a
rank needs at its peak beside that of the whole model in one process, and the largest difference of gradients from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fxcollab
from tests.benchmarks.speed.pairs import ratio
from tests.benchmarks.speed.steps import NETWORKS
from tests.live_bytes import LiveBytes

RANKS = 2


def main() -> None:
    """Measure, and print a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["ResNet-32", "ResNet-50"])
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    for network in arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (network, folder, arguments.pairs), nprocs=RANKS)
            rows = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
        slower = max(rows, key=lambda row: row["step"])
        print(
            json.dumps({"network": network, **slower, "peaks of the ranks": [row["peak"] for row in rows]}),
            flush=True,
        )
    if torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_synchronised, (folder,), nprocs=2 * RANKS)


def _start(rank: int, folder: str, ranks: int) -> torch.device:
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    backend = "nccl" if gpus >= ranks else "cpu:gloo,cuda:gloo" if gpus else "gloo"
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    return device


def _rank(rank: int, network: str, folder: str, pairs: int) -> None:
    device = _start(rank, folder, RANKS)
    make, _, splits, shape = NETWORKS[network]
    torch.manual_seed(0)
    single = make().to(device)
    whole = fxcollab.transform(copy.deepcopy(single), "simple", splits[:1], seed=0)
    part = fxcollab.spread(copy.deepcopy(whole))
    unchecked = fxcollab.spread(copy.deepcopy(whole), check_every=0)
    x = torch.rand(shape, device=device)
    y = torch.arange(shape[0], device=device) % 10
    loss = fxcollab.CollaborativeLoss()
    alone = _stepper(single, nn.functional.cross_entropy, x, y)
    together = _stepper(part, loss, x, y)
    row = ratio(together, alone, pairs)
    checks = ratio(together, _stepper(unchecked, loss, x, y), pairs)
    found: dict[str, Any] = {
        "device": str(device),
        "step": round(1 / row["ratio"], 3),
        "from and to": [round(1 / each, 3) for each in reversed(row["spread"])],
        "seconds": row["seconds"],
        "step with checks over without": round(1 / checks["ratio"], 3),
        "peak": _peak(part, loss, x, y),
        "peak of the whole": _peak(whole, loss, x, y),
        "peak of the single network": _peak(single, nn.functional.cross_entropy, x, y),
    }
    whole.zero_grad()
    part.zero_grad()
    loss(whole(x), y).backward()
    loss(part(x), y).backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    found["gradients apart"] = max(
        float((p.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-3))
        for name, p in part.named_parameters()
        if p.grad is not None
    )
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _stepper(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)  # weights stay, so that steps are alike

    def step() -> None:
        dist.barrier()
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def _peak(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> str:
    """The most bytes at once in a first step, storage by storage: of state, gradients, momentum and activations."""
    step = _stepper(model, loss, x, y)
    model.zero_grad()
    with LiveBytes([*model.parameters(), *model.buffers(), x, y]) as live:
        step()
    return f"{live.peak / 2**20:.0f} MB"


def _synchronised(rank: int, folder: str) -> None:
    """Two heads times two halves of a batch, with SyncBatchNorm over the halves."""
    device = _start(rank, folder, 2 * RANKS)
    mesh = init_device_mesh(device.type, (RANKS, RANKS), mesh_dim_names=("heads", "data"))
    data = mesh["data"].get_group()
    make, _, splits, shape = NETWORKS["ResNet-32"]
    torch.manual_seed(0)
    whole = fxcollab.transform(make().to(device), "simple", splits[:1], seed=0)
    part = nn.SyncBatchNorm.convert_sync_batchnorm(fxcollab.spread(copy.deepcopy(whole), mesh), data)
    model = DistributedDataParallel(part, process_group=data)
    x, y = torch.rand(16, *shape[1:], device=device), torch.arange(16, device=device) % 10
    loss, half = fxcollab.CollaborativeLoss(), mesh["data"].get_local_rank()
    loss(whole(x), y).backward()
    loss(model(x.chunk(2)[half]), y.chunk(2)[half]).backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    apart = max(
        float((p.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-3))
        for name, p in part.named_parameters()
        if p.grad is not None
    )
    statistics = dict(whole.named_buffers())
    moved = max(float((b - statistics[name]).abs().max()) for name, b in part.named_buffers() if "running" in name)
    print(f"rank {rank}: SyncBatchNorm over data: gradients apart {apart:.1e}, statistics {moved:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
