"""By how much a process grows in a real step of a built training graph.

Measured twice: with malloc as it is, and with one that hands freed memory back to the system at once. As it is,
glibc's keeps blocks of up to 32 MiB for later use, and fills the gaps between them as well as it can: that is memory
of the process, but of no tensor.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
    as_it_is, handed_back = _alone(network, graph, {}), _alone(network, graph, HANDED_BACK)
    predicted = as_it_is["predicted"]
    return {
        "predicted": predicted,
        "grown": as_it_is["grown"],
        "difference": round(predicted / as_it_is["grown"] - 1, 4),
        "grown, handed back": handed_back["grown"],
        "difference, handed back": round(predicted / handed_back["grown"] - 1, 4),
    }


def conclusion(rows: list[Row]) -> str:
    """How far the prediction is off at most."""
    as_it_is, handed_back = (max(abs(row[key]) for row in rows) for key in ("difference", "difference, handed back"))
    return f"growth at most {as_it_is:.1%} off, {handed_back:.1%} where freed memory is handed back"


def _alone(network: str, graph: str, environment: Mapping[str, str]) -> Row:
    command = [sys.executable, "-m", "tests.benchmarks.costs.process", network, graph]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def grow(network: str, graph: str) -> Row:
    """Bytes by which this process grows while it trains one step with SGD and momentum."""
    import torch
    import torchvision

    import fxcollab
    from fxcollab.costs.attribution import backward

    torch.set_num_threads(2)
    with torch.device("meta"):
        planned = getattr(torchvision.models, network)()
    inputs = (torch.empty(BATCH, 3, 224, 224, device="meta"),)
    costs = fxcollab.training_costs(planned, splits=SPLITS[network], example_inputs=inputs)
    _step(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), torch.rand(2, 3, 16, 16), backward)  # what torch loads once
    gc.collect()
    before = _resident()
    model = getattr(torchvision.models, network)()
    x = torch.rand(BATCH, 3, 224, 224)
    trained = fxcollab.transform(model, splits=SPLITS[network], seed=0) if graph == "hierarchical" else model
    _step(trained, x, backward)
    step = costs.training if graph == "hierarchical" else costs.original
    return {"predicted": step.memory, "grown": _peak() - before}


def _step(model: Any, x: Any, backward: Any) -> None:
    import torch

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
    print(json.dumps(grow(*sys.argv[1:])))
