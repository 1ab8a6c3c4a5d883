"""State and random numbers of branches that are computed again."""

from __future__ import annotations

import copy
import random
from collections import UserList, deque
from collections.abc import Callable, Iterator
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxcollab
from fxcollab.errors import PatternError, StateError
from fxcollab.runtime.recompute import recompute as runtime
from tests.networks import TrunkGoesOn
from tests.references import SmallConvNet
from tests.runtime.recompute_helpers import (
    TREES,
    Dropping,
    RememberingNet,
    X,
    assert_equal,
    loss_of,
    nothing_computed_again,
    pair,
    step,
)
from tests.speeds import slow_but


def test_random_numbers_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, again = pair(Dropping, splits=["first", "second"])
    with nothing_computed_again(monkeypatch):
        expected = step(again)
        following = torch.rand(3)
    assert_equal(step(again), expected)
    assert torch.equal(torch.rand(3), following)


class Drawing(nn.Module):
    """Draws from Python's generator, inside a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * random.random()


class DrawingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drawing, self.last = nn.Linear(768, 8), Drawing(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drawing(self.first(x.flatten(1))))


def test_pythons_random_numbers_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, again = pair(DrawingNet, pattern="simple", splits=["first"])
    found = []
    for patched in (True, False):
        random.seed(3)
        if patched:
            with nothing_computed_again(monkeypatch):
                found.append(step(again))
        else:
            found.append(step(again))
        found[-1] |= {"following": torch.tensor(random.random())}
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("granularity", slow_but(["auto"], ["auto", "op"]))
@pytest.mark.filterwarnings("ignore:limitation")
def test_state_that_a_branch_reads_and_writes_is_read_as_it_was_and_written_once(granularity: str) -> None:
    plain, again = pair(RememberingNet, pattern="simple", splits=["first"], granularity=granularity)
    for _ in range(2):
        expected, found = step(plain), step(again)
    assert_equal(found, expected)
    assert found["memory.scale"][0] == 0.25


class Notes(dict[str, int]):
    """A dictionary of the user's."""


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class State(NamedTuple):
    seen: Tensor


def numbers() -> Iterator[int]:
    yield from range(1000)


class Holding(nn.Module):
    """Keeps things between calls wherever Python can; ``write`` changes one of them."""

    total = 0
    table: ClassVar[dict[str, int]] = {"calls": 0}

    def __init__(self, write: Callable[[Any], object] = lambda held: None) -> None:
        super().__init__()
        self.fc, self.write = nn.Linear(8, 8), write
        self.calls, self.shape, self.name, self.ema, self.seen = 0, torch.Size([6, 8]), "a name", None, torch.ones(8)
        self.cache: dict[str, list[Tensor]] = {"means": []}
        self.box = SimpleNamespace(count=0, pairs=deque([(torch.zeros(8), 0)], maxlen=2))
        self.own, self.foreign, self.python = torch.Generator(), np.random.default_rng(4), random.Random(5)
        self.array, self.notes, self.slotted, self.state = np.ones(2), Notes(n=0), Slotted(), State(torch.ones(8))
        self.listed, self.numbers, self.norms = UserList([0]), iter([1, 2, 3]), [nn.BatchNorm1d(8)]
        self.cache["itself"] = self.cache  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        self.write(self)
        return torch.tanh(x)


WRITES: dict[str, Callable[[Any], object]] = {
    "calls": lambda held: setattr(held, "calls", held.calls + 1),
    "ema": lambda held: setattr(held, "ema", torch.ones(8)),
    "added": lambda held: setattr(held, "added", 1),
    "name": lambda held: vars(held).pop("name", None),
    "seen": lambda held: held.seen.mul_(0.9),
    "cache": lambda held: held.cache["means"].append(torch.ones(8)),
    "box": lambda held: setattr(held.box, "count", 2),
    "own": lambda held: torch.rand(8, generator=held.own),
    "foreign": lambda held: held.foreign.random(),
    "python": lambda held: held.python.random(),
    "array": lambda held: np.multiply(held.array, 0.5, out=held.array),
    "notes": lambda held: held.notes.update(n=1),
    "slotted": lambda held: setattr(held.slotted, "count", 1),
    "state": lambda held: held.state.seen.mul_(0.9),
    "listed": lambda held: held.listed.append(1),
    "numbers": lambda held: next(held.numbers),
    "norms": lambda held: held.norms[0](torch.ones(2, 8)),
    "total": lambda held: setattr(type(held), "total", held.total + 1),
    "table": lambda held: held.table.update(calls=held.table["calls"] + 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_a_branch_writes_beside_buffers_is_refused(name: str) -> None:
    module = Holding(WRITES[name])
    with pytest.raises(
        StateError, match=rf"(?s)keeps something beside buffers.*, Holding\.{name}\n.*register_buffer"
    ):
        runtime(lambda x: module(x), (module,), torch.ones(6, 8))
    with torch.no_grad():
        runtime(lambda x: module(x), (module,), torch.ones(6, 8))


def test_a_branch_that_wrote_is_refused_at_every_call() -> None:
    module = Holding(WRITES["calls"])

    def branch(x: Tensor) -> Tensor:
        return module(x)

    for _ in range(2):
        with pytest.raises(StateError, match=r"Holding\.calls"):
            runtime(branch, (module,), torch.ones(6, 8))


def test_what_is_held_and_not_changed_is_no_write() -> None:
    def write_the_same(held: Any) -> None:
        held.calls, held.shape, held.name = int("0"), torch.ones(6, 8).shape, " ".join(["a", "name"])
        held.train(held.training)

    module = Holding(write_the_same)
    for _ in range(2):
        runtime(lambda x: module(x), (module,), torch.ones(6, 8)).sum().backward()
    assert module.fc.weight.grad is not None


def test_an_iterator_that_cannot_be_read_is_refused() -> None:
    module = Holding()
    module.numbers = numbers()
    with pytest.raises(StateError, match=r"(?s)Holding\.numbers.*iterator"):
        runtime(lambda x: module(x), (module,), torch.ones(6, 8))


def test_what_is_written_in_train_mode_alone_is_refused_there() -> None:
    module = Holding(lambda held: held.training and WRITES["calls"](held)).eval()

    def branch(x: Tensor) -> Tensor:
        return module(x)

    runtime(branch, (module,), torch.ones(6, 8)).sum().backward()
    module.train()
    with pytest.raises(StateError, match=r"Holding\.calls"):
        runtime(branch, (module,), torch.ones(6, 8))


def test_a_training_model_that_counts_is_refused_and_trains_with_a_buffer() -> None:
    _, again = pair(lambda: Around(Counts), pattern="simple", splits=["first"])
    with pytest.raises(StateError, match=r"(?s)branch_b., Counts\.calls.*hint: keep it in a buffer"):
        again(X)
    plain, again = pair(RememberingNet, pattern="simple", splits=["first"])
    assert_equal(step(again), step(plain))


class CachesAtFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @cached_property
    def scale(self) -> Tensor:
        return torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * self.scale


def test_what_only_the_first_call_sets_is_held_after_a_call_before_the_transform() -> None:
    with pytest.raises(StateError, match=r"(?s)CachesAtFirst\.scale.*call the model once before"):
        pair(lambda: Around(CachesAtFirst), pattern="simple", splits=["first"])[1](X)

    def called() -> nn.Module:
        model = Around(CachesAtFirst)
        model(X)
        return model

    plain, again = pair(called, pattern="simple", splits=["first"])
    assert_equal(step(again), step(plain))


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:no module initialises")
def test_weights_that_torch_computes_before_each_call_are_no_write(norm: Callable[[nn.Module], nn.Module]) -> None:
    models = []
    for recompute in (None, "heads"):
        torch.manual_seed(0)
        model = Around(lambda: norm(nn.Linear(8, 8)))
        models.append(fxcollab.transform(model, "simple", ["first"], seed=1, recompute=recompute))
    for _ in range(2):
        assert_equal(step(models[1]), step(models[0]))


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_weights_that_torch_keeps_in_lists_are_no_write(recurrent: type[nn.RNNBase]) -> None:
    module = recurrent(8, 8)
    runtime(lambda x: module(x)[0], (module,), torch.ones(3, 2, 8)).sum().backward()
    expected = torch.func.functional_call(module, dict(module.named_parameters()), torch.ones(3, 2, 8))[0]
    found = torch.autograd.grad(expected.sum(), list(module.parameters()))
    assert all(map(torch.equal, found, (parameter.grad for parameter in module.parameters())))


class Carries(nn.Module):
    """Goes on from its last result, which it keeps with its graph until it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(8, 8), torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.fc(x) + self.last.detach())
        return self.last.sin()


def test_a_result_that_is_kept_with_its_graph_is_read_as_it_was() -> None:
    plain, again = pair(lambda: Around(Carries), pattern="simple", splits=["first"])
    for _ in range(3):
        assert_equal(step(again), step(plain))


class Views(nn.Module):
    """Buffers that share memory, and one that is added by the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, grid = nn.Linear(8, 8), torch.ones(2, 8)
        self.register_buffer("grid", grid)
        self.register_buffer("row", grid[0])

    def forward(self, x: Tensor) -> Tensor:
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(8))
        self.grid.mul_(0.8)
        self.late.mul_(0.7)
        return torch.tanh(self.fc(x)) * self.row.clone() * self.late.clone()


def test_buffers_that_share_memory_or_come_late_are_as_they_were_too() -> None:
    module, x = Views(), torch.ones(6, 8)
    plain = copy.deepcopy(module)
    for _ in range(2):
        runtime(lambda x: module(x), (module,), x).sum().backward()
        plain(x).sum().backward()
    assert_equal(dict(module.named_buffers()), dict(plain.named_buffers()))
    assert torch.equal(module.fc.weight.grad, plain.fc.weight.grad)
    assert module.row.untyped_storage().data_ptr() == module.grid.untyped_storage().data_ptr()


class Averages(nn.Module):
    """A running mean of the user's own, which is read once it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.no_grad():
            self.mean.lerp_(y.mean(0), 0.1)
        return torch.tanh(y - self.mean)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.fc(x)) * self.calls


class Around(nn.Module):
    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(768, 8), body(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x.flatten(1))))


@pytest.mark.parametrize(
    "body", slow_but([Averages], [Averages, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))])
)
@pytest.mark.filterwarnings("ignore:no module initialises")
def test_what_a_compiler_cannot_compute_again_runs_as_it_is(body: Callable[[], nn.Module]) -> None:
    plain, again = pair(lambda: Around(body), pattern="simple", splits=["first"])
    compiled = torch.compile(again, backend="aot_eager")
    for _ in range(2):
        expected, found = step(plain), step(compiled)
        for name, value in expected.items():
            assert_close(found[f"_orig_mod.{name}"], value)


@pytest.mark.slow
def test_what_a_compiled_branch_writes_beside_buffers_is_refused() -> None:
    _, again = pair(lambda: Around(Counts), pattern="simple", splits=["first"])
    with pytest.raises(StateError, match=r"Counts\.calls"):
        torch.compile(again, backend="aot_eager")(X)


@pytest.mark.parametrize("body", [Averages, lambda: nn.Linear(8, 8)])
def test_weights_that_were_changed_before_the_backward_are_refused(body: Callable[[], nn.Module]) -> None:
    _, again = pair(lambda: Around(body), pattern="simple", splits=["first"])
    loss = loss_of(again(X))
    with torch.no_grad():
        next(again.get_submodule("peers.b1.body").parameters()).mul_(2)
    with pytest.raises(StateError, match=r"(?s)written since the forward.*branch_b1, Linear\.weight"):
        loss.backward()


class CallsLate(nn.Module):
    """The trunk calls a module that counts after what lies behind the split has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.counts, self.last = nn.Linear(768, 8), nn.Linear(8, 8), Counts(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        return self.last(self.counts(self.first(x)) + self.counts(x))


@pytest.mark.filterwarnings("ignore:limitation")
def test_state_that_would_be_another_in_the_second_pass_is_refused() -> None:
    with pytest.raises(PatternError, match=r"(?s)can't be computed again.*counts_1.*'counts'.*calls the same module"):
        fxcollab.transform(CallsLate(), "simple", ["first"], recompute="heads")


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_scripted_module_with_buffers_is_refused() -> None:
    model = Around(lambda: torch.jit.script(Scales()))
    with pytest.raises(PatternError, match=r"(?s)can't be computed again.*body.*a scripted module has buffers"):
        fxcollab.transform(model, "simple", ["first"], recompute="heads")


class CalledOnBothSides(nn.Module):
    """A BatchNorm and a weight that are used in the trunk and behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.norm = nn.Linear(768, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.norm(self.embed(x.flatten(1)))))
        return self.last(self.norm(torch.tanh(self.second(x))))


@pytest.mark.filterwarnings("ignore:limitation")
def test_what_is_used_on_both_sides_of_a_split_is_computed_again() -> None:
    plain, again = pair(lambda: CalledOnBothSides().double(), pattern="simple", splits=["first"], heads=3)
    for _ in range(2):
        expected, found = step(plain, X.double()), step(again, X.double())
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:limitation")
class NormHandedOn(nn.Module):
    """A BatchNorm that a function calls, which stays one node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(called(self.norm, self.first(x.flatten(1))))


@torch.fx.wrap
def called(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def test_the_state_of_a_module_that_is_handed_to_a_function_is_written_once() -> None:
    plain, again = pair(NormHandedOn, pattern="simple", splits=["first"])
    assert_equal(step(again), step(plain))
    assert again.get_buffer("norm.num_batches_tracked") == 1


def test_statistics_that_would_be_gathered_in_another_order_are_refused() -> None:
    with pytest.raises(PatternError, match=r"(?s)can't be computed again: b0.*norm_1.*between 'norm' and 'add'"):
        fxcollab.transform(TrunkGoesOn(), "simple", ["first"], recompute="heads")


def test_a_mode_that_changes_before_the_backward_changes_nothing() -> None:
    plain, again = pair(SmallConvNet, **TREES["simple"])
    expected = step(plain)
    loss = loss_of(again(X))
    again.eval()
    loss.backward()
    assert_equal(
        {name: p.grad for name, p in again.named_parameters()}, {n: expected[n] for n, _ in again.named_parameters()}
    )
    assert not any(module.training for module in again.modules())


class WritesItsWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


def test_a_forward_that_writes_into_a_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), WritesItsWeight(8, 5))
    again = fxcollab.transform(model, "simple", ["1"], recompute="heads")
    with pytest.raises(StateError, match=r"(?s)writes into a parameter.*WritesItsWeight.weight"):
        again(X)
