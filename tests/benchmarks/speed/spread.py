"""A step of two ranks with a head each against one of the single network, in both ranks at the same time."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fxcollab
from tests.benchmarks.rows import Row
from tests.benchmarks.speed.devices import training_step
from tests.benchmarks.speed.pairs import ratio
from tests.benchmarks.speed.steps import NETWORKS

RANKS = 2


def cases() -> Iterator[tuple[str]]:
    """Networks whose step is short and long."""
    return ((network,) for network in ("ResNet-32", "ResNet-50"))


def measure(network: str) -> Row:
    """Seconds of a rank's step over those of the single network's; the slower rank counts."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (network, folder), nprocs=RANKS)
        rows: list[Row] = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    slower = min(rows, key=lambda row: row["ratio"])
    return {"time": round(1 / slower["ratio"], 3), "backend": slower["backend"], "spread": slower["spread"]}


def conclusion(rows: list[Row]) -> str:
    """Case by case."""
    return "; ".join(f"{row['case'][0]} {row['time']}x the single network's step" for row in rows)


def _rank(rank: int, network: str, folder: str) -> None:
    torch.set_num_threads(1)
    cuda = torch.cuda.device_count() >= RANKS
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    make, _, splits, shape = NETWORKS[network]
    torch.manual_seed(0)
    model = make().to(device)
    single = copy.deepcopy(model)
    part = fxcollab.spread(fxcollab.transform(model, "simple", splits[:1], seed=0))
    x, y = torch.rand(shape, device=device), torch.zeros(shape[0], dtype=torch.long, device=device)
    loss = fxcollab.CollaborativeLoss()

    def alone() -> None:
        dist.barrier()
        training_step(single, nn.functional.cross_entropy, x, y)

    row = ratio(lambda: training_step(part, loss, x, y), alone, pairs=7)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(row | {"backend": backend}))
    dist.destroy_process_group()
