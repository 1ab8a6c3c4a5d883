"""The time of a step of a built training graph, as a ratio to the original's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor, nn

import fxcollab
from fxcollab.costs.attribution import backward
from tests.benchmarks.rows import Row

NETWORKS = {
    "resnet50": ["layer2", "layer3"],
    "densenet121": ["features.denseblock1", "features.denseblock2"],
    "convnext_tiny": ["features.3", "features.5"],
    "vit_b_16": ["encoder.layers.encoder_layer_3", "encoder.layers.encoder_layer_7"],
}
BATCH, PAIRS = 8, 5


def cases() -> Iterator[tuple[str]]:
    """Four networks."""
    return ((network,) for network in NETWORKS)


def measure(network: str) -> Row:
    """Predict, build, and take steps of both in turns."""
    model = getattr(torchvision.models, network)()
    x = torch.rand(BATCH, 3, 224, 224)
    costs = fxcollab.training_costs(model, splits=NETWORKS[network], example_inputs=(x,), measure=True)
    train_model = fxcollab.transform(model, splits=NETWORKS[network], seed=0)
    _seconds(model, x), _seconds(train_model, x)
    pairs = [(_seconds(model, x), _seconds(train_model, x)) for _ in range(PAIRS)]
    ratios = [new / old for old, new in pairs]
    measured = statistics.median(ratios)
    return {
        "FLOPs": round(costs.flops, 3),
        "predicted": round(costs.time, 3),
        "measured": round(measured, 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "difference": round(costs.time / measured - 1, 4),
        "seconds": round(statistics.median(old for old, _ in pairs), 3),
    }


def conclusion(rows: list[Row]) -> str:
    """How far the prediction is off at most."""
    return f"ratios of time at most {max(abs(row['difference']) for row in rows):.1%} off"


def _seconds(model: nn.Module, x: Tensor) -> float:
    model.train().zero_grad()
    start = time.perf_counter()
    backward(model(x))
    return time.perf_counter() - start
