"""What a forward keeps outside of its parameters is as it was after a capture: caches, counters, containers."""

from __future__ import annotations

import collections
import copy
import functools
import random
import threading
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.errors import CaptureError
from tests.speeds import slow_but

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class Net(nn.Module):
    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Linear(8, 8), part or nn.Identity(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.c(self.a(x)))


@functools.lru_cache
def cached_positions(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)


@functools.cache
def pair_of_positions(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count, dtype=torch.float32), torch.ones(count)


TABLE: dict[int, Tensor] = {}


def table_of_positions(count: int) -> Tensor:
    if count not in TABLE:
        TABLE[count] = torch.arange(count, dtype=torch.float32)
    return TABLE[count]


CACHES: dict[str, Callable[[int], Tensor]] = {
    "lru_cache": cached_positions,
    "cache of pairs": lambda count: pair_of_positions(count)[0],
    "dict": table_of_positions,
}


@pytest.mark.parametrize("cache", slow_but(["lru_cache"], CACHES))
@pytest.mark.parametrize("opened", slow_but([True], [False, True]))
def test_a_cache_holds_tensors_after_a_capture(cache: str, opened: bool) -> None:
    positions = CACHES[cache]
    cached_positions.cache_clear()
    pair_of_positions.cache_clear()
    TABLE.clear()

    class Adds(Kept):
        def forward(self, x: Tensor) -> Any:
            return self.layer(x) + positions(8) + positions(8)

    model = Net(Adds())
    train_model = fxcollab.transform(model, "simple", ["c.layer" if opened else "a"])
    if cache != "dict":  # what a cache holds when it is captured is a constant, and verify captures again
        fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert type(model(X)) is Tensor
    assert type(positions(8)) is Tensor


PAIRS: dict[int, tuple[Tensor, Tensor]] = {}


@pytest.mark.slow
def test_many_tuples_in_a_cache_are_all_taken_out() -> None:
    class AddsAll(Kept):
        def forward(self, x: Tensor) -> Any:
            for count in range(20):
                PAIRS.setdefault(count, (torch.arange(8.0), torch.ones(8)))
            return self.layer(x) + sum(pair[0] for pair in PAIRS.values())

    fxcollab.capture(Net(AddsAll()), ["c.layer"])
    assert PAIRS == {}


class Clamps(Kept):
    def forward(self, x: Tensor) -> Any:
        for parameter in self.parameters():
            parameter.data.clamp_(min=0)
        return self.layer(x)


class CountsInATensor(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.step = torch.zeros(())

    def forward(self, x: Tensor) -> Any:
        self.step += 1
        return self.layer(x)


class CountsInAList(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.counts = [torch.zeros(())]

    def forward(self, x: Tensor) -> Any:
        self.counts[0].add_(1)
        return self.layer(x)


@pytest.mark.parametrize("make", [Clamps, CountsInATensor, CountsInAList])
@pytest.mark.parametrize("split", slow_but(["a"], ["a", "c.layer"]))
def test_tracing_writes_into_no_tensor_of_the_model(make: type[Kept], split: str) -> None:
    model = Net(make())
    weight = model.c.layer.weight.clone()
    try:
        fxcollab.transform(model, "simple", [split], example_inputs=(X,))
    except fxcollab.FxCollabError as error:
        assert error.where and error.why and error.hint
    assert torch.equal(weight, model.c.layer.weight)
    counts = getattr(model.c, "step", None), *getattr(model.c, "counts", ())
    assert all(count is None or count == 0 for count in counts)


def test_a_write_into_a_plain_tensor_of_a_module_is_recorded() -> None:
    model = Net(CountsInATensor())
    train_model = fxcollab.transform(model, "simple", ["c.layer"], example_inputs=(X,))
    train_model(X)
    assert train_model.get_submodule("c").step == 1


class Logs(Kept):
    def __init__(self, log: Any) -> None:
        super().__init__()
        self.log = log

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        self.note(y.mean().detach())
        return y

    def note(self, value: Any) -> None:
        log = self.log
        match log:
            case types.SimpleNamespace():
                log.last = value
            case {"nested": nested}:
                nested.append(value)
            case dict():
                log["mean"].append(value)
            case _:
                log.append(value)


@pytest.mark.parametrize(
    "log",
    [collections.defaultdict(list), collections.deque(), {"nested": []}, types.SimpleNamespace(), []],
    ids=lambda log: type(log).__name__,
)
@pytest.mark.parametrize("split", slow_but(["a"], ["a", "c.layer"]))
@pytest.mark.filterwarnings("ignore:limitation")
def test_containers_hold_what_they_held(log: Any, split: str) -> None:
    before = repr(log)
    fxcollab.transform(Net(Logs(log)), "simple", [split])
    assert repr(log) == before


class Journal:
    """An object of the user's, with others in it."""

    def __init__(self) -> None:
        self.entries: list[int] = []
        self.last = types.SimpleNamespace(size=0)
        self.inner: Journal | None = None


class KeepsAJournal(Kept):
    """Changes an array, generators, objects, its class and a tensor in a tuple at every call."""

    calls = 0
    shared: ClassVar[dict[str, int]] = {"calls": 0}

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.fixed = (torch.ones(2), 0), np.broadcast_to(np.nan, 3)
        self.table, self.foreign, self.old = np.ones(2), np.random.default_rng(0), np.random.RandomState(1)
        self.own, self.python = torch.Generator().manual_seed(2), random.Random(3)
        self.journal = Journal()
        self.journal.inner = Journal()

    def forward(self, x: Tensor) -> Tensor:
        assert self.journal.inner is not None
        self.table *= 2
        type(self).calls += 1
        self.shared["calls"] += 1
        self.pair[0].mul_(0.5)
        self.journal.inner.entries.append(1)
        self.journal.last.size += 1
        shift = self.foreign.random() + self.old.rand() + self.python.random()
        return self.layer(x) + torch.rand(8, generator=self.own) * shift


def held_by(module: KeepsAJournal) -> list[Any]:
    inner = module.journal.inner
    return [
        module.table.tolist(),
        (KeepsAJournal.calls, KeepsAJournal.shared["calls"], module.pair[0].tolist()),
        module.foreign.bit_generator.state,
        module.old.get_state()[1].tolist(),
        module.own.get_state().tolist(),
        module.python.getstate(),
        module.journal.last.size,
        inner and inner.entries,
    ]


@pytest.mark.filterwarnings("ignore:limitation")
def test_arrays_generators_and_objects_are_as_they_were() -> None:
    part = KeepsAJournal()
    expected = copy.deepcopy(held_by(part))
    fxcollab.transform(Net(part), "simple", ["a"], seed=0, init="copy-anyway")
    assert fxcollab.choose_splits(Net(part), (X,)).splits == ("a", "c")
    assert held_by(part) == expected
    with pytest.raises(CaptureError, match="that is not a parameter, a buffer or an attribute"):
        fxcollab.transform(Net(part), "simple", ["c.layer"], seed=0, init="copy-anyway")
    assert held_by(part) == expected


class DrawsFromItsOwn(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.rand(8, generator=self.own)


@pytest.mark.slow
def test_an_opened_generator_is_refused_where_it_is_handed_on() -> None:
    with pytest.raises(
        CaptureError, match=r"(?s)test_untouched_world.*an object of type Generator can't be an argument"
    ):
        fxcollab.transform(Net(DrawsFromItsOwn()), "simple", ["c.layer"], seed=0)


def test_models_of_other_threads_run_as_they_are_meanwhile() -> None:
    started, seen = threading.Event(), list[Any]()
    other = nn.Sequential(nn.Linear(8, 8))

    class Waits(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            started.set()
            thread.join()
            return self.b(y)

    model = Waits()

    def run() -> None:
        started.wait()
        seen.extend([type(other(X)), type(model.b(X))])

    thread = threading.Thread(target=run)
    thread.start()
    captured = fxcollab.capture(model, ["a"], (X,))
    assert seen == [Tensor, Tensor]
    assert [node.name for node in captured.graph.nodes] == ["x", "a", "b", "output"]


class Twice(Kept):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


def test_a_call_of_a_modules_own_is_a_part_of_its_node() -> None:
    model = Net(Twice())
    fxcollab.verify(model, fxcollab.transform(model, "simple", ["a"]), (X,)).raise_if_failed()
    assert Twice.__call__ is vars(Twice)["__call__"] and Twice.__call__.__qualname__ == "Twice.__call__"


class StaysInEvalMode(Kept):
    def train(self, mode: bool = True) -> StaysInEvalMode:
        return super().train(False)

    def forward(self, x: Tensor) -> Any:
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


def test_a_part_that_stays_in_eval_mode_does_so_in_the_graph() -> None:
    model = Net(StaysInEvalMode())
    train_model = fxcollab.transform(model, "simple", ["c.layer"])
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert torch.equal(train_model.train()(X)[0], model.train()(X))


@functools.lru_cache
def halves(shape: torch.Size, twice: int) -> tuple[int, int]:
    return shape[-1] // twice, shape[-1] - shape[-1] // twice


class HalvesByShape(Net):
    def forward(self, x: Tensor) -> Any:
        left, right = halves(self.a(x).shape, 2)
        return self.b(self.a(x).split([left, right], -1)[0].repeat(1, 2))


@pytest.mark.slow
def test_a_cache_by_shapes_forgets_the_shapes_of_a_trace() -> None:
    """As einops keeps one: train mode's trace must not meet eval mode's proxies, nor the model either's."""
    halves.cache_clear()
    model = HalvesByShape()
    train_model = fxcollab.transform(model, splits=["a@2"], example_inputs=(X,), seed=0)
    assert fxcollab.verify(model, train_model, (X,))
    assert model(X).shape == (2, 8)
