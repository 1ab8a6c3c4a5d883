"""Branches of a level run as one against one after the other: a step of four heads, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fxcollab
from tests.benchmarks.rows import Row
from tests.benchmarks.speed.devices import CUDA, batch, placed, training_step
from tests.benchmarks.speed.pairs import ratio
from tests.benchmarks.speed.steps import NETWORKS

SHAPES = {
    "ResNet-32": ((2, 3, 8, 8), (8, 3, 16, 16), (128, 3, 32, 32)),
    "ViT-S": ((64 if CUDA else 1, 3, 224, 224),),
    "ResNet-50": ((64 if CUDA else 8, 3, 224, 224),),
}
"""From kernels so small that their launch is what takes time to such as fill the device."""


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Four instances and the tree; compiled where there is a GPU, or kernels are small."""
    for network, shapes in SHAPES.items():
        for shape in shapes:
            for how in ("eager", "compiled"):
                if how == "eager" or (network == "ResNet-32" and (CUDA or shape[0] < 128)):
                    for pattern in ("multi-instance", "hierarchical"):
                        yield network, "x".join(map(str, shape)), pattern, how


def measure(network: str, size: str, pattern: str, how: str) -> Row:
    """How many times faster a step is as one; gradients must be the same to rounding."""
    make, _, splits, _ = NETWORKS[network]
    x, y = batch(tuple(map(int, size.split("x"))))
    torch.manual_seed(0)
    named: Any = splits if pattern == "hierarchical" else ()
    plain = fxcollab.transform(placed(make()), pattern, named, heads=4, seed=0)  # type: ignore[arg-type]
    batched = fxcollab.batch_branches(plain)
    loss = fxcollab.CollaborativeLoss()
    ways: list[Callable[..., Any]] = [batched, plain]
    if how == "compiled":
        ways = [torch.compile(way) for way in ways]
    here, there = (lambda way=way: training_step(way, loss, x, y) for way in ways)
    return {"difference": _difference(here, there, plain), **ratio(here, there, pairs=7)}


def _difference(here: Callable[[], object], there: Callable[[], object], model: nn.Module) -> float:
    """The largest difference of a gradient, beside the largest of that gradient's values."""
    gradients = []
    for step in (here, there):
        step()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    largest = max(
        float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
        for one, other in zip(*gradients, strict=True)
    )
    return float(f"{largest:.1e}")


def conclusion(rows: list[Row]) -> str:
    """Where it pays."""
    faster = [row for row in rows if row["ratio"] > 1.05]
    said = "; ".join(f"{' '.join(row['case'])} {row['ratio']}x" for row in faster)
    return f"faster as one in {len(faster)} of {len(rows)} cases: {said or 'none'}"
