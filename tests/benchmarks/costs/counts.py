"""FLOPs and memory of built training graphs, on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

import fxcollab
from fxcollab.costs.costs import parameter_count
from fxcollab.costs.profile import backward
from fxcollab.tracing.examples import guess_inputs, run_on_twin
from tests.benchmarks.proof import NETWORKS, TREES
from tests.benchmarks.rows import Row

BATCH = 8


def cases() -> Iterator[tuple[str, str]]:
    """Every network under every tree."""
    return ((network, tree) for network in NETWORKS for tree in TREES)


def measure(network: str, tree: str) -> Row:
    """One network under one tree."""
    build, names = NETWORKS[network]
    levels, arguments = TREES[tree]
    splits = names[-levels:] if levels else []
    model = _on_meta(build)
    [spec] = guess_inputs(model).inputs
    inputs = (torch.zeros(BATCH, *(spec.shape or ())[1:]),)
    costs = fxcollab.training_costs(model, splits=splits, example_inputs=inputs, optimizer=0, **arguments).training
    train_model = fxcollab.transform(model, splits=splits, example_inputs=inputs, seed=0, **arguments)
    built = _built(train_model, tracked=tree == "hierarchical")
    row: Row = {"flops": costs.flops, "flops built": built["flops"]}
    row["parameters equal"] = costs.parameters == parameter_count(train_model)
    if "memory" in built:
        difference = costs.memory / built["memory"] - 1
        row |= {"memory": costs.memory, "memory built": built["memory"], "difference": round(difference, 4)}
    return row


def conclusion(rows: list[Row]) -> str:
    """How many are equal, and how far the rest is off."""
    equal = sum(row["flops"] == row["flops built"] and row["parameters equal"] for row in rows)
    off = max((abs(row["difference"]) for row in rows if "difference" in row), default=0.0)
    return f"FLOPs and parameters of {equal} of {len(rows)} equal; peak of memory at most {off:.1%} off"


def _built(train_model: fxcollab.CollabGraphModule, tracked: bool) -> Mapping[str, int]:
    interface = train_model.meta["fxcollab"].interface
    found: dict[str, int] = {}

    def step(model: nn.Module, *inputs: torch.Tensor) -> None:
        counter, tracker = FlopCounterMode(display=False), MemTracker()
        with counter:
            if not tracked:
                backward(model(*inputs))
            else:
                tracker.track_external(model, *inputs)
                with tracker:
                    backward(model(*inputs))
                [peak] = tracker.get_tracker_snapshot("peak").values()
                found["memory"] = peak["Total"]
        found["flops"] = counter.get_total_flops()

    with train_model.in_mode(True):
        run_on_twin(train_model, interface, run=step)
    return found


def _on_meta(build: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # a constructor that computes with values
        return build().to("meta")
