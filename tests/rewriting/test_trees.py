"""Head trees of any shape: the whole proof, an independent reference, and heads pruned from names alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxcollab
from fxcollab.plan import plan_of
from fxcollab.tree import Fanout, HeadTree, branch_name
from tests.speeds import slow_but

LADDER = "ladder"
TREES: dict[str, Sequence[Fanout] | str] = {
    "2 of 3": (2, (2, 1)),
    "3 of 6": (3, (1, 3, 2)),
    "three levels": (2, (1, 2), (3, 1, 1)),
    "ladder 2": LADDER + " 2",
    "ladder 3": LADDER + " 3",
    "ladder 4": LADDER + " 4",
    "ladder 5": LADDER + " 5",
}


class Layers(nn.Sequential):
    """Linear layers with batch norm and activations in place."""

    def __init__(self) -> None:
        super().__init__(*(self._layer() for _ in range(6)), nn.Linear(8, 3))

    @staticmethod
    def _layer() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Three scales; every split lets skip connections of the scales before it cross."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 8, 8)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip((3, *widths), widths, strict=False))
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.up = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for conv in self.down:
            x = torch.relu_(conv(x))
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for conv in self.up:
            x = torch.relu(conv(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skips.pop()], 1)))
        x = nn.functional.interpolate(x, scale_factor=2.0)
        return cast(Tensor, self.last(torch.cat([x, skips.pop()], 1)))


def _vit_tiny() -> nn.Module:
    import timm

    return cast(nn.Module, timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4))


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str], Tensor]] = {
    "layers": (Layers, ["0", "1", "2", "3", "4"], torch.randn(5, 8, generator=torch.Generator().manual_seed(0))),
    "resnet18": (torchvision.models.resnet18, ["relu", "layer1", "layer2", "layer3", "layer4.0"], IMAGES),
    "vit tiny": (_vit_tiny, [f"blocks.{k}" for k in (1, 3, 5, 7, 9)], IMAGES),
    "densenet121": (
        torchvision.models.densenet121,
        ["features.pool0", *(f"features.transition{k}" for k in (1, 2, 3)), "features.denseblock4.denselayer2"],
        IMAGES,
    ),
    "unet": (UNet, ["down.0", "down.1", "middle", "up.0", "up.1"], IMAGES),
}


def transformed(
    network: str, shape: str, **options: Any
) -> tuple[nn.Module, fxcollab.CollabGraphModule, HeadTree, Tensor]:
    make, splits, inputs = NETWORKS[network]
    torch.manual_seed(0)
    model, fanouts = make(), TREES[shape]
    if isinstance(fanouts, str):
        pattern, count, *heads = fanouts.split()
        options |= {"pattern": pattern, "splits": splits[: int(count)], "heads": int(heads[0]) if heads else None}
    else:
        options |= {"splits": splits[: len(fanouts)], "fanouts": fanouts}
    train_model = fxcollab.transform(model, seed=0, init="copy-anyway", example_inputs=(inputs,), **options)
    return model, train_model, plan_of(train_model).tree, inputs


CASES = [
    pytest.param(network, shape, id=f"{network}, {shape}")
    for network in NETWORKS
    for shape in TREES
    if network in ("layers", "unet") or shape in ("three levels", "ladder 3")  # the others take long
]
FAST = [f"layers, {shape}" for shape in TREES] + ["unet, 2 of 3", "unet, ladder 3"]


@pytest.mark.parametrize(("network", "shape"), slow_but(FAST, CASES))
def test_trees_of_any_shape_are_proved(network: str, shape: str) -> None:
    model, train_model, tree, inputs = transformed(network, shape)
    fxcollab.verify(model, train_model, (inputs,)).raise_if_failed()
    if shape.startswith(LADDER):
        assert tree.heads == tree.depth + 1


@pytest.mark.parametrize("network", slow_but(["layers"], ["layers", "resnet18", "unet"]))
@pytest.mark.parametrize("shape", ["2 of 3", "three levels", "ladder 3"])
def test_every_head_is_pruned_from_the_names_of_a_state_dict(network: str, shape: str) -> None:
    _, train_model, tree, inputs = transformed(network, shape)
    with torch.no_grad():
        for name, parameter in train_model.named_parameters():
            if name.startswith("peers."):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    expected = fxcollab.all_heads(train_model.eval())(inputs)
    alone = NETWORKS[network][0]()
    for head in range(tree.heads):
        alone.load_state_dict(fxcollab.prune_state_dict(train_model.state_dict(), head))
        torch.testing.assert_close(alone.eval()(inputs), expected[head], rtol=0, atol=0)
    assert {name.split(".")[1] for name in train_model.state_dict() if name.startswith("peers.")} <= {
        branch_name(path) for path in tree.peers()
    }


@pytest.mark.parametrize("network", slow_but(["layers", "unet"], ["layers", "unet", "resnet18", "vit tiny"]))
@pytest.mark.parametrize("shape", ["2 of 3", "ladder 3"])
def test_trees_of_any_shape_are_computed_again(network: str, shape: str) -> None:
    model, train_model, _, inputs = transformed(network, shape, recompute="heads")
    fxcollab.verify(model, train_model, (inputs,)).raise_if_failed()


class ByHand(nn.Module):
    """Three heads on two splits, the first branch split again; gradients are scaled by hooks (equation 5)."""

    def __init__(self, train_model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        state = train_model.state_dict()
        for part, layers, prefix in [
            ("trunk", "0", ""), ("b0", "1", ""), ("b1", "1", "peers.b1."),
            ("b0_0", "23456", ""), ("b0_1", "23456", "peers.b0_1."), ("b1_0", "23456", "peers.b1_0."),
        ]:  # fmt: skip
            source = Layers().double()
            self.parts[part] = nn.Sequential(*(source[int(layer)] for layer in layers))
            for number, layer in enumerate(layers):
                own = f"{prefix}{layer}."
                source[int(layer)].load_state_dict(
                    {k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}
                )
                self.parts[part][number] = source[int(layer)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trunk = self.parts["trunk"](x)
        first, second = self.parts["b0"](scaled(trunk, 2 / 3)), self.parts["b1"](scaled(trunk, 1 / 3))
        return (
            self.parts["b0_0"](scaled(first, 1 / 2)),
            self.parts["b0_1"](scaled(first, 1 / 2)),
            self.parts["b1_0"](second),
        )


def scaled(x: Tensor, factor: float) -> Tensor:
    x = x.clone()
    x.register_hook(lambda gradient: gradient * factor)
    return x


def test_the_gradients_of_an_uneven_tree_are_those_of_a_network_written_by_hand() -> None:
    torch.manual_seed(0)
    model = Layers().double()
    train_model = fxcollab.transform(model, splits=["0", "1"], fanouts=(2, (2, 1)), seed=3)
    by_hand = ByHand(train_model)
    x, weights = torch.randn(5, 8).double(), torch.randn(3, 5, 3).double()
    for network in (train_model, by_hand):
        torch.stack([(weight * out).sum() for weight, out in zip(weights, network(x), strict=True)]).sum().backward()
    found = {name: parameter.grad for name, parameter in train_model.named_parameters()}
    places = {"trunk": ("0", ""), "b0": ("1", ""), "b1": ("1", "peers.b1."), "b0_0": ("23456", "")}
    places |= {"b0_1": ("23456", "peers.b0_1."), "b1_0": ("23456", "peers.b1_0.")}
    checked = 0
    for name, parameter in by_hand.named_parameters():
        _, part, number, rest = name.split(".", 3)
        layers, prefix = places[part]
        torch.testing.assert_close(found.pop(f"{prefix}{layers[int(number)]}.{rest}"), parameter.grad)
        checked += 1
    assert not found and checked
