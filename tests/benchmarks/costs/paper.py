"""Table 4 of the paper, ResNet-50 on ImageNet, beside the calculation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torchvision

import fxcollab
from tests.benchmarks.rows import Row

TABLE = {
    "2 instances": ("multi-instance", (), 2.0, 2.0),
    "2 heads, simple": ("simple", ("layer2",), 1.4, 1.32),
    "4 heads, hierarchical": ("hierarchical", ("layer2", "layer3"), 1.75, 1.5),
}
BATCHES = (32, 64, 128)


def cases() -> Iterator[tuple[str]]:
    """The rows of collaborative learning."""
    return ((name,) for name in TABLE)


def measure(name: str) -> Row:
    """Ratios at several batches: parameters weigh less in larger ones."""
    pattern, splits, time, memory = TABLE[name]
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    found = {batch: _costs(model, pattern, splits, batch) for batch in BATCHES}
    return {
        "time, paper": time,
        "FLOPs": round(found[BATCHES[0]].flops, 2),
        "memory, paper": memory,
        **{f"memory, batch {batch}": round(costs.memory, 2) for batch, costs in found.items()},
        "activations": round(found[BATCHES[-1]].activations, 2),
    }


def conclusion(rows: list[Row]) -> str:
    """What the comparison says."""
    worst = max(abs(row[f"memory, batch {BATCHES[-1]}"] / row["memory, paper"] - 1) for row in rows)
    return f"memory at batch {BATCHES[-1]} within {worst:.0%} of the paper's"


def _costs(model: torch.nn.Module, pattern: Any, splits: tuple[str, ...], batch: int) -> fxcollab.Costs:
    inputs = (torch.empty(batch, 3, 224, 224, device="meta"),)
    return fxcollab.training_costs(model, pattern, splits, example_inputs=inputs)
