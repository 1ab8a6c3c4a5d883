"""The memory of four heads whose branches are computed again, and what that takes, beside the plain graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.costs.profile import backward
from fxcollab.tracing.examples import run_on_twin
from fxcollab.tracing.interface import InputSpec, Interface
from tests.benchmarks.rows import Row
from tests.benchmarks.speed.devices import batch, placed, training_step
from tests.benchmarks.speed.pairs import ratio
from tests.benchmarks.speed.steps import NETWORKS
from tests.live_bytes import LiveBytes

CASES = {"ResNet-50": (64, 8), "ResNet-32": (128, 128)}
"""Batch of the count of memory, and of the times."""


def cases() -> Iterator[tuple[str]]:
    """Every network, hierarchical."""
    return ((network,) for network in CASES)


def measure(network: str) -> Row:
    """Peaks of a step without an optimizer, counted storage by storage on fake tensors; and times, in turns."""
    make, _, splits, shape = NETWORKS[network]
    size, timed = CASES[network]
    with torch.device("meta"):
        single = make().train()
        plain, again = (fxcollab.transform(make().train(), splits=splits, recompute=how) for how in (None, "heads"))
        inputs = (torch.empty(size, *shape[1:]),)
        predicted = fxcollab.training_costs(
            single, splits=splits, example_inputs=inputs, optimizer=0, recompute="heads"
        )
    alone, *peaks = (_peak(model, (size, *shape[1:])) for model in (single, plain, again))
    times = _times(network, timed)
    return {
        "memory": round(peaks[1] / alone, 3),
        "memory of the plain graph": round(peaks[0] / alone, 3),
        "memory as predicted": round(predicted.memory, 3),
        **times,
    }


def conclusion(rows: list[Row]) -> str:
    """Case by case."""
    said = (
        f"{row['case'][0]} {row['memory']}x the single network's memory (plain {row['memory of the plain graph']}x) "
        f"in {row['time']}x the plain graph's time (by FLOPs {row['FLOPs']}x)"
        for row in rows
    )
    return "; ".join(said)


def _peak(model: nn.Module, shape: tuple[int, ...]) -> int:
    peaks: list[int] = []

    def step(model: nn.Module, *inputs: Tensor) -> None:
        with LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as live:
            backward(model(*inputs))
        peaks.append(live.peak)

    run_on_twin(model, Interface((InputSpec("x", shape, "float32"),)), run=step)
    return peaks[0]


def _times(network: str, count: int) -> Row:
    make, _, splits, shape = NETWORKS[network]
    model = placed(make())
    x, y = batch((count, *shape[1:]))
    plain, again = (
        fxcollab.transform(copy.deepcopy(model), splits=splits, seed=0, recompute=how) for how in (None, "heads")
    )
    loss = fxcollab.CollaborativeLoss()
    row = ratio(lambda: training_step(again, loss, x, y), lambda: training_step(plain, loss, x, y), pairs=7)
    flops = [
        fxcollab.training_costs(model, splits=splits, example_inputs=(x,), recompute=how).training.flops
        for how in ("heads", None)
    ]
    return {"time": round(1 / row["ratio"], 3), "FLOPs": round(flops[0] / flops[1], 3), "spread": row["spread"]}
