"""How long the search for splits takes, beside the capture of the same model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.splits.candidates import survey
from fxcollab.tracing.capture import Granularity
from tests.benchmarks.choice.picks import build
from tests.benchmarks.rows import Row


class Deep(nn.Module):
    """Blocks of a layer, an activation and a skip, with a pooling now and then: four nodes a block."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(blocks))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Of images of four channels."""
        for place, layer in enumerate(self.layers):
            x = torch.relu(layer(x) * 0.5) + x
            if place % 600 == 599:
                x = nn.functional.max_pool2d(x, 2)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def _deep(blocks: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.device("meta"):
            return Deep(blocks)

    return make


CASES: dict[str, tuple[Callable[[], nn.Module], Granularity]] = {
    **{
        name: (lambda name=name: build(name), "auto")
        for name in (
            "timm:vit_gigantic_patch14_224", "timm:swinv2_cr_giant_224", "timm:convnextv2_huge", "timm:nfnet_f7",
            "timm:tf_efficientnet_l2", "timm:regnety_2560", "timm:resnetv2_152x4_bit",
        )
    },
    "timm:tf_efficientnet_l2, op-level": (lambda: build("timm:tf_efficientnet_l2"), "op"),
    "torchvision:densenet201, op-level": (lambda: build("torchvision:densenet201"), "op"),
    "2,500 nodes, op-level": (_deep(625), "op"),
    "5,000 nodes, op-level": (_deep(1250), "op"),
    "10,000 nodes, op-level": (_deep(2500), "op"),
}  # fmt: skip


def search(name: str) -> Row:
    """Seconds of the capture that the choice leads to, and of the whole choice."""
    make, granularity = CASES[name]
    model = make()
    inputs = (torch.empty(2, 4, 64, 64, device="meta"),) if isinstance(model, Deep) else None
    start = time.perf_counter()
    choice = fxcollab.choose_splits(model, inputs, granularity=granularity)
    searched = time.perf_counter() - start
    start = time.perf_counter()
    captured = fxcollab.capture(model, choice.splits, inputs, granularity)
    took = time.perf_counter() - start
    found = survey(model, inputs, granularity)
    return {
        "nodes": max(len(captured.graph.nodes), len(found.cuts.costs.nodes)),
        "candidates": len(found.candidates),
        "capture": round(took, 2),
        "search": round(searched, 2),
    }
