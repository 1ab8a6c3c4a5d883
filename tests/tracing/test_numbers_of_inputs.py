"""Sizes and counts that vary from call to call are not pinned where a node can compute them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcollab

torch.manual_seed(0)


def proved(model: nn.Module, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...], **options: Any) -> None:
    options = {"splits": ["blocks.0", "blocks.1"], "seed": 0, **options}
    train_model = fxcollab.transform(model, example_inputs=inputs, **options)
    fxcollab.verify(model, train_model, others).raise_if_failed()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        return self.rest(self.blocks[0](x))

    def rest(self, x: Tensor) -> Any:
        return self.blocks[2](self.blocks[1](x))


@functools.lru_cache(8)
def flattened(shape: tuple[int, ...]) -> tuple[int, int, int]:
    batch, height, width, channels = shape
    return batch, height * width, channels


class ByCachedShape(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](x)
        return self.rest(x.reshape(flattened(tuple(x.shape))))


RECIPES: dict[tuple[int, ...], tuple[int, ...]] = {}


def merged(x: Tensor) -> Tensor:
    if tuple(x.shape) not in RECIPES:
        RECIPES[tuple(x.shape)] = (x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
    return x.reshape(RECIPES[tuple(x.shape)])


class ByAHelpersDict(Net):
    def forward(self, x: Tensor) -> Any:
        return self.rest(merged(self.blocks[0](x)))


def padded_to_even(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]]) if x.shape[0] % 2 else x


class PadsInAHelper(Net):
    def forward(self, x: Tensor) -> Any:
        return self.rest(padded_to_even(self.blocks[0](x)))


@pytest.mark.parametrize("net", [ByCachedShape, ByAHelpersDict, PadsInAHelper])
def test_what_a_function_asks_about_sizes_is_asked_at_every_call(net: type[Net]) -> None:
    proved(net(), (torch.randn(2, 3, 3, 8),), (torch.randn(3, 3, 3, 8),))


def written_if_big(x: Tensor) -> Tensor:
    if x.shape[0] > 2:
        x.add_(1)
    return x


class WritesIfBig(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](x)
        return self.rest(written_if_big(x) * x)


def test_a_function_that_asks_may_write_for_other_sizes_so_that_heads_have_copies() -> None:
    proved(WritesIfBig(), (torch.randn(2, 8),), (torch.randn(5, 8),), splits=["blocks.0"])


def halves(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return (x[:3], x[3:]) if x.shape[0] > 3 else (x, None)


class AsksForHalves(Net):
    def forward(self, x: Tensor) -> Any:
        first, second = halves(self.blocks[0](x))
        return self.rest(first if second is None else second)


def noted(x: Tensor, notes: list[Tensor]) -> Tensor:
    if x.shape[0] > 2:
        notes.append(x)
    return x


class NotesInAList(Net):
    def forward(self, x: Tensor) -> Any:
        notes: list[Tensor] = []
        x = noted(self.blocks[0](x), notes)
        return self.rest(sum(notes, x))


@pytest.mark.parametrize("net", [AsksForHalves, NotesInAList])
def test_what_else_a_function_does_for_other_sizes_is_guarded(net: type[Net]) -> None:
    proved(net(), (torch.randn(2, 8),), (torch.randn(2, 8),), splits=["blocks.0"])
    train_model = fxcollab.transform(net(), splits=["blocks.0"], example_inputs=(torch.randn(2, 8),), seed=0)
    with pytest.raises(fxcollab.CaptureError, match="takes a different branch"):
        train_model(torch.randn(5, 8))


class ByLength(Net):
    def forward(self, x: Tensor) -> Any:
        return self.rest(self.blocks[0](x) + torch.arange(len(x)).unsqueeze(1))


class ByLengthOfAProduct(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](x)
        return self.rest(x.new_zeros(len(x) + 1, 8)[: len(x)] + x / len(x))


class ByLengthInAList(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](x)
        return self.rest(x.split([1, len(x) - 1])[1])


@pytest.mark.parametrize("net", [ByLength, ByLengthOfAProduct, ByLengthInAList])
def test_the_length_of_a_tensor_is_not_pinned(net: type[Net]) -> None:
    proved(net(), (torch.randn(2, 8),), (torch.randn(3, 8),))


class Unrolled(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](x)
        return self.rest(torch.stack([x[i] for i in range(len(x))]))


def test_a_length_that_is_unrolled_is_pinned_and_said() -> None:
    with pytest.warns(UserWarning, match="was taken from an example input"):
        train_model = fxcollab.transform(Unrolled(), splits=["blocks.0"], example_inputs=(torch.randn(2, 8),), seed=0)
    with pytest.raises(fxcollab.CaptureError, match="is 2; here it is 3"):
        train_model(torch.randn(3, 8))


def asked(shape: torch.Size) -> Any:
    try:
        return shape.prod()  # type: ignore[attr-defined]
    except AttributeError:  # a tuple has no such method
        return shape[0]


USES = {
    "numpy": lambda x: x.reshape(-1, int(np.prod(x.shape[1:]))),
    "try": lambda x: x.reshape(-1, asked(x.shape[1:])),
    "round": lambda x: x[: round(x.shape[0] * 0.5)],
    "divmod": lambda x: x[: divmod(x.shape[0], 2)[0] + 1],
}


class Uses(Net):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.rest(self.use(self.blocks[0](x)))


@pytest.mark.parametrize("use", USES)
def test_numbers_computed_from_sizes_follow_them(use: str) -> None:
    proved(Uses(USES[use]), (torch.randn(2, 8),), (torch.randn(5, 8),))


def test_a_copy_of_a_tensor_is_made_by_the_graph() -> None:
    proved(Uses(lambda x: copy.copy(x) + x), (torch.randn(2, 8),), (torch.randn(3, 8),))
    proved(Uses(lambda x: copy.deepcopy(x.detach()).mul_(2) + x), (torch.randn(2, 8),), (torch.randn(3, 8),))
