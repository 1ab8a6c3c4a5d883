"""A training step of what `transform` makes against a multi-head module written by hand, with the same loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import fxcollab
from samples.networks.resnet_cifar import resnet32
from tests.benchmarks.rows import Row
from tests.benchmarks.speed.devices import batch, placed, training_step
from tests.benchmarks.speed.pairs import ratio

Stages = Callable[[nn.Module], list[nn.Module]]
PATTERNS = {"multi-instance": (2,), "simple": (2,), "hierarchical": (2, 2)}


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, factor):  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * ctx.factor, None


class ByHand(nn.Module):
    """A network cut into stages, of which all behind the first have a copy a branch."""

    def __init__(self, stages: list[nn.Module], fanouts: tuple[int, ...]) -> None:
        super().__init__()
        self.fanouts = fanouts
        counts = [1]
        for fanout in fanouts:
            counts.append(counts[-1] * fanout)
        self.levels = nn.ModuleList(
            nn.ModuleList(copy.deepcopy(stage) for _ in range(count))
            for stage, count in zip(stages, counts, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [self.levels[0][0](x)]
        for fanout, stages in zip(self.fanouts, self.levels[1:], strict=True):
            scaled = [_Scale.apply(value, 1 / fanout) for value in values]
            values = [stage(scaled[index // fanout]) for index, stage in enumerate(stages)]
        return tuple(values)


def _resnet_cifar(model: nn.Module) -> list[nn.Module]:
    stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU(), model.stage1)
    return [stem, model.stage2, nn.Sequential(model.stage3, model.pool, nn.Flatten(), model.fc)]


def _resnet(model: nn.Module) -> list[nn.Module]:
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2)
    return [stem, model.layer3, nn.Sequential(model.layer4, model.avgpool, nn.Flatten(), model.fc)]


class _Embed(nn.Module):
    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"conv": model.conv_proj})
        self.token, self.position = model.class_token, model.encoder.pos_embedding
        self.blocks = model.encoder.layers[:4]

    def forward(self, x: Tensor) -> Tensor:
        patches = self.model["conv"](x).flatten(2).transpose(1, 2)
        value: Tensor = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position)
        return value


class _Classify(nn.Module):
    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.blocks, self.norm, self.heads = model.encoder.layers[8:], model.encoder.ln, model.heads

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.heads(self.norm(self.blocks(x))[:, 0])
        return value


def _vit(model: nn.Module) -> list[nn.Module]:
    assert isinstance(model, VisionTransformer)
    return [_Embed(model), model.encoder.layers[4:8], _Classify(model)]


_VIT_S = partial(VisionTransformer, 224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)
_BLOCKS = ["encoder.layers.encoder_layer_3", "encoder.layers.encoder_layer_7"]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Stages, list[str], tuple[int, ...]]] = {
    "ResNet-32": (resnet32, _resnet_cifar, ["stage1", "stage2"], (128, 3, 32, 32)),
    "ResNet-50": (torchvision.models.resnet50, _resnet, ["layer2", "layer3"], (8, 3, 224, 224)),
    "ViT-S": (_VIT_S, _vit, _BLOCKS, (8, 3, 224, 224)),
}


def cases() -> Iterator[tuple[str, str]]:
    """Every network under every pattern."""
    return ((network, pattern) for network in NETWORKS for pattern in PATTERNS)


def measure(network: str, pattern: str) -> Row:
    """Steps of both in turns; then of the single network beside the training model."""
    make, stages, splits, shape = NETWORKS[network]
    model = placed(make())
    parts, named = (
        _parts(stages(model), pattern),
        splits[: len(PATTERNS[pattern])] if pattern != "multi-instance" else (),
    )
    by_hand = placed(ByHand(parts, PATTERNS[pattern]))
    x, y = batch(shape, on_a_gpu=max(shape[0], 64))
    single = copy.deepcopy(model)
    train_model = fxcollab.transform(model, pattern, named, seed=0)  # type: ignore[arg-type]
    loss = fxcollab.CollaborativeLoss()
    row = ratio(lambda: training_step(train_model, loss, x, y), lambda: training_step(by_hand, loss, x, y), pairs=7)
    alone = ratio(
        lambda: training_step(train_model, loss, x, y),
        lambda: training_step(single, nn.functional.cross_entropy, x, y),
        pairs=5,
    )
    costs = fxcollab.training_costs(single, pattern, named, example_inputs=(x,))  # type: ignore[arg-type]
    times = 1 / alone["ratio"]
    return row | {
        "time": round(times, 3),
        "FLOPs": round(costs.flops, 3),
        "time over FLOPs": round(times / costs.flops, 3),
    }


def conclusion(rows: list[Row]) -> str:
    """Over all cases."""
    slowest = max(1 / row["ratio"] for row in rows)
    dearest = max(row["time over FLOPs"] for row in rows)
    return f"steps take at most {slowest:.3f}x those by hand, and {dearest:.2f} of the FLOPs ratio at most"


def _parts(stages: list[nn.Module], pattern: str) -> list[nn.Module]:
    """As many stages as the pattern has levels; independent instances have all of the network behind the input."""
    if pattern == "multi-instance":
        return [nn.Identity(), nn.Sequential(*stages)]
    return stages if pattern == "hierarchical" else [stages[0], nn.Sequential(*stages[1:])]
