"""Sizes and counts that vary from call to call are not pinned where a node can compute them."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import GuardError

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


ONE_ROW, SCALE = torch.ones(1, 8), torch.ones(8)
GIVEN_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape, a list": lambda x: torch.reshape(x, [x.shape[0], x.shape[1]]),
    "reshape, a tuple": lambda x: torch.reshape(x.t(), (x.shape[0], -1)),
    "broadcast_to": lambda x: x + torch.broadcast_to(ONE_ROW, [x.shape[0], 8]),
    "expand of a constant": lambda x: x * SCALE.expand([x.shape[0], 8]),
    "repeat of a constant": lambda x: x * ONE_ROW.repeat(x.shape[0], 1),
    "tile": lambda x: x * torch.tile(ONE_ROW, (x.shape[0], 1)),
    "narrow": lambda x: torch.narrow(x, 0, 0, x.shape[0]) * 2,
    "narrow of a constant": lambda x: x + torch.narrow(ONE_ROW.expand(9, 8), 0, 1, x.shape[0]),
    "unflatten": lambda x: torch.unflatten(x.flatten(), 0, (x.shape[0], 8)),
    "as_strided": lambda x: torch.as_strided(x, (x.shape[0], 8), (8, 1)).relu(),
    "split": lambda x: torch.cat(torch.split(x, [1, x.shape[0] - 1])[::-1]),
    "roll": lambda x: torch.roll(x, x.shape[0] - 1, 0),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.shape[0], 0)[: x.shape[0]],
    "interpolate": lambda x: nn.functional.interpolate(x[None], size=[x.shape[1] - 0])[0],
    "pad": lambda x: nn.functional.pad(x, (0, 0, x.shape[0], 0))[-x.shape[0] :],
}


class AsksForASize(Net):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](x)
        for _ in range(x.shape[1] // 4):  # needs an index, so that there are examples
            x = x * 1.5
        return self.rest(self.function(x))


@pytest.mark.parametrize("name", GIVEN_SIZES)
def test_sizes_that_are_handed_to_torch_may_differ_where_others_were_asked_for(name: str) -> None:
    proved(AsksForASize(GIVEN_SIZES[name]), (torch.randn(2, 8),), (torch.randn(5, 8),))


def test_what_python_asks_for_an_index_stays_as_it_was() -> None:
    model = AsksForASize(lambda x: torch.stack([x[i] for i in range(x.shape[0])]))
    train_model = fxcollab.transform(model, splits=["blocks.0"], example_inputs=(torch.randn(2, 8),))
    with pytest.raises(GuardError, match=r"index\(\.\.\.\) is 2; here it is 3"):
        train_model(torch.randn(3, 8))


def test_code_that_is_made_anew_at_every_call_is_given_its_indices_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxcollab.tracing.queries.MOST_PLACES", 5)
    made = itertools.count()

    def repeated(x: Tensor) -> Tensor:
        scope: dict[str, Any] = {"__name__": f"made_{next(made)}"}
        exec("def times(x, n):\n    return sum([x for _ in range(n)])", scope)
        return scope["times"](x, x.shape[1])  # type: ignore[no-any-return]

    proved(AsksForASize(repeated), (torch.randn(2, 8),), (torch.randn(5, 8),))


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
