"""A split at a list or dict of modules, which has no forward, is one at the last of them that is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor, fx, nn

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
        (lambda: fx.symbolic_trace(Stack()), "blocks", "blocks.2"),
        pytest.param(Around, "stack.blocks", "stack.blocks.2", marks=pytest.mark.slow),
        (lambda: Stack((0, 1, 2, 0)), "blocks", "blocks.0@2"),
    ],
    ids=["all", "backwards", "some", "dict", "traced", "nested", "again"],
)
def test_a_split_at_a_list_of_modules_is_one_at_the_last_of_them_called(
    make: Callable[[], nn.Module], split: str, last: str
) -> None:
    assert made(make(), (X,), [split]).code == made(make(), (X,), [last]).code
    proven(make(), splits=[split])


def test_a_split_at_the_second_call_of_a_list_is_refused() -> None:
    with pytest.raises(SplitError, match="There is no call 'blocks@2'") as caught:
        made(Stack((0, 1, 0)), (X,), ["blocks@2"])
    assert caught.value.why == "blocks is called once"


class Aside(Block):
    """Calls the parts of a module, not the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Block(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner.first(x).relu() + 1)


def test_a_module_with_a_forward_that_is_not_called_returns_nothing() -> None:
    with pytest.raises(SplitError, match="Module 'inner' returns no value of the captured graph") as caught:
        made(Aside(), (X,), ["inner"])
    assert caught.value.why == "the forward calls the modules in it, but not the module itself"
    assert caught.value.hint == "split at the last of them: 'inner.first'"
    proven(Aside(), splits=["inner.first"])


def test_a_split_at_a_list_of_modules_that_are_never_called_names_none_of_them() -> None:
    with pytest.raises(SplitError) as caught:
        made(Stack(()), (X,), ["blocks"])
    assert caught.value.why == "the forward never calls it"
    assert caught.value.hint == "split at a module that the forward calls: head"
