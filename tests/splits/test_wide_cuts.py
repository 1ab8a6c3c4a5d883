"""Cuts at several values, where no single one cuts well: no level does next to nothing, and the proof holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab
from fxcollab import choose_splits
from fxcollab.splits.option import LEAST
from fxcollab.tracing.capture import Granularity
from tests.rewriting.test_trees import UNet
from tests.speeds import slow_but

GENERATOR = torch.Generator().manual_seed(0)
ROWS, MORE = torch.randn(3, 16, generator=GENERATOR), torch.randn(3, 16, generator=GENERATOR)
IMAGES = torch.randn(2, 3, 32, 32, generator=GENERATOR)


def layers(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(count)))


class Siamese(nn.Module):
    """One encoder for both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = layers(4), nn.Linear(32, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(x), self.encoder(y)], 1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = layers(5), layers(3)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(y)], 1))


class Streams(nn.Module):
    """Streams that exchange values from the first layer to the last, and are never one value."""

    def __init__(self, streams: int = 3, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(streams)) for _ in range(depth))

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x] * len(self.layers[0])
        for each in self.layers:
            values = [torch.tanh(layer(value)) for layer, value in zip(each, values, strict=True)]
            values = [value + other for value, other in zip(values, [*values[1:], values[0]], strict=True)]
        return values


class LongSkips(nn.Module):
    """Every layer reads all values before it, and those are also read at the end."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        values = [self.layers[0](x)]
        for layer in self.layers[1:]:
            values.append(torch.relu(layer(sum(values))))
        return torch.stack(values).sum(0)


class Pyramid(nn.Module):
    """Outputs of three scales, of which each is read from its own place of the backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.sides = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        kept = []
        for number, stage in enumerate(self.stages):
            x = torch.relu(stage(x))
            if number % 2:
                kept.append(x)
        top, found = torch.zeros_like(kept[-1]), {}
        for number, (side, value) in enumerate(zip(self.sides, reversed(kept), strict=True)):
            top = side(value + top)
            found[f"p{number}"] = F.avg_pool2d(top, 4)
        return found


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "unet": (UNet, (IMAGES,)),
    "siamese": (Siamese, (ROWS, MORE)),
    "two inputs": (TwoInputs, (ROWS, MORE)),
    "streams": (Streams, (ROWS,)),
    "long skips": (LongSkips, (ROWS,)),
    "pyramid": (Pyramid, (IMAGES,)),
}


@pytest.mark.parametrize("granularity", slow_but(["auto"], ["auto", "op"]))
@pytest.mark.parametrize("network", NETWORKS)
def test_no_level_of_a_chosen_tree_does_next_to_nothing_and_the_proof_holds(
    network: str, granularity: Granularity
) -> None:
    make, inputs = NETWORKS[network]
    torch.manual_seed(0)
    model = make()
    choice = choose_splits(model, inputs, granularity=granularity)
    assert min(choice.option.shares) >= LEAST / len(choice.option.shares)
    train_model = fxcollab.transform(model, splits=choice, example_inputs=inputs, granularity=granularity, seed=0)
    fxcollab.verify(model, train_model, inputs).raise_if_failed()


def test_the_reason_says_how_many_values_cross_and_what_they_weigh() -> None:
    choice = choose_splits(Streams(), (ROWS,), fanouts=(2,))
    (cut,) = choice.option.cuts
    assert cut.crossing == (3, 3 * ROWS.nbytes)
    assert cut.name.count("+") == 2
    assert choice.reason.endswith(f"several values cross: 3 at {cut.name} (0.0 MB)")


class Skipped(nn.Module):
    """Two blocks of many layers, with a skip connection around each."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.head = layers(1), nn.Linear(16, 2)
        self.first, self.second = (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inc(x)
        y = self.second(self.first(x))
        return self.head(y * x)


def test_of_cuts_as_good_the_end_of_the_outermost_module_is_listed() -> None:
    names = [candidate.name for candidate in fxcollab.find_splits(Skipped(), (ROWS,))]
    assert "first" in names and "first.1" not in names


def test_where_one_value_cuts_well_no_other_cut_is_looked_for() -> None:
    found = fxcollab.find_splits(layers(12), (ROWS,))
    assert found and all(candidate.is_narrow for candidate in found)
