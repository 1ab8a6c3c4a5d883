"""Splits at a list or dict of modules, which the forward never calls itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from fxcollab import SplitError
from tests.tracing.question_helpers import X, made, proven


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Stack(nn.Module):
    def __init__(self, order: Sequence[Any] = (0, 1, 2)) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList([Block() for _ in range(3)])
        self.order, self.head = order, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for which in self.order:
            x = self.blocks[which](x)
        return self.head(x)


class DictOfBlocks(Stack):
    def __init__(self) -> None:
        super().__init__(("one", "two"))
        self.blocks = nn.ModuleDict({"one": Block(), "two": Block()})


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack, self.head = Stack(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(x))


@pytest.mark.parametrize(
    ("make", "split", "last"),
    [
        pytest.param(Stack, "blocks", "blocks.2", marks=pytest.mark.slow),
        (lambda: Stack((2, 1, 0)), "blocks", "blocks.0"),
        pytest.param(lambda: Stack((0, 1)), "blocks", "blocks.1", marks=pytest.mark.slow),
        (DictOfBlocks, "blocks", "blocks.two"),
        pytest.param(Around, "stack.blocks", "stack.blocks.2", marks=pytest.mark.slow),
        (lambda: Stack((0, 1, 2, 0)), "blocks", "blocks.0@2"),
    ],
    ids=["all", "backwards", "some", "dict", "nested", "again"],
)
def test_a_split_at_a_list_of_modules_names_the_last_one_called(
    make: Callable[[], nn.Module], split: str, last: str
) -> None:
    model = make()
    with pytest.raises(SplitError, match=f"Module '{split}' returns no value of the captured graph") as caught:
        made(model, (X,), [split])
    assert caught.value.why == "the forward calls the modules in it, but not the module itself"
    assert caught.value.hint == f"split at the last of them: '{last}'"
    proven(model, splits=[last])


def test_a_split_at_a_list_of_modules_that_are_never_called_names_none_of_them() -> None:
    with pytest.raises(SplitError) as caught:
        made(Stack(()), (X,), ["blocks"])
    assert caught.value.why == "the forward never calls it"
    assert caught.value.hint == "split at a module that the forward calls: head"
