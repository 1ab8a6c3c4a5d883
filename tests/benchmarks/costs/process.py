"""By how much a process grows in a real step of a built training graph.

Measured twice: with malloc as it is, and with one that hands freed memory back to the system at once. As it is,
glibc's keeps blocks of up to 32 MiB for later use, and fills the gaps between them as well as it can: that is memory
of the process, but of no tensor.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import fxcollab
from fxcollab.costs.profile import backward
from tests.benchmarks.rows import Row

SPLITS = {
    "resnet50": ["layer2", "layer3"],
    "densenet121": ["features.transition1", "features.transition2"],
    "vit_b_16": ["encoder.layers.encoder_layer_3", "encoder.layers.encoder_layer_7"],
}
BATCH = 16
HANDED_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: larger blocks are mapped, and unmapped when freed


def cases() -> Iterator[tuple[str, str]]:
    """The original and its hierarchical training graph, of networks that are large enough to be seen."""
    return ((network, graph) for network in SPLITS for graph in ("original", "hierarchical"))


def measure(network: str, graph: str) -> Row:
    """One graph in a process of its own."""
    model, x = _built(network)
    costs = fxcollab.training_costs(model, splits=SPLITS[network], example_inputs=(x,))
    predicted = (costs.training if graph == "hierarchical" else costs.original).memory
    as_it_is, handed_back = _alone(network, graph, {}), _alone(network, graph, HANDED_BACK)
    return {
        "predicted": predicted,
        "grown": as_it_is,
        "difference": round(predicted / as_it_is - 1, 4),
        "grown, handed back": handed_back,
        "difference, handed back": round(predicted / handed_back - 1, 4),
    }


def conclusion(rows: list[Row]) -> str:
    """How far the prediction is off at most."""
    as_it_is, handed_back = (max(abs(row[key]) for row in rows) for key in ("difference", "difference, handed back"))
    return f"growth at most {as_it_is:.1%} off, {handed_back:.1%} where freed memory is handed back"


def _alone(network: str, graph: str, environment: Mapping[str, str]) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.costs.process", network, graph]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return int(done.stdout.splitlines()[-1])


def grow(network: str, graph: str) -> int:
    """Bytes by which this process grows while it trains one step with SGD and momentum."""
    torch.set_num_threads(2)
    warm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))
    fxcollab.transform(warm, splits=["0"], seed=0)
    _step(warm, torch.rand(2, 3, 16, 16))  # what is loaded once
    gc.collect()
    before = _resident()
    model, x = _built(network)
    _step(fxcollab.transform(model, splits=SPLITS[network], seed=0) if graph == "hierarchical" else model, x)
    return _peak() - before


def _built(network: str) -> tuple[nn.Module, Tensor]:
    return getattr(torchvision.models, network)(), torch.rand(BATCH, 3, 224, 224)


def _step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):  # the optimizer's state is there from the second on
        optimizer.zero_grad()
        backward(model.train()(x))
        optimizer.step()


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(entry))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(grow(*sys.argv[1:]))
