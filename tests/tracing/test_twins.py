"""Looking at a model leaves it as it was, whatever its own Python does meanwhile."""

from __future__ import annotations

import functools
import gc
import threading
import types
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.deep_copy import clone_of, deep_copy
from fxcollab.tracing.leaks import purge_leaks
from fxcollab.tracing.twin import twin_of
from tests.speeds import slow_but

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Stages(nn.Module):
    """``first``, ``middle`` and ``last``; a subclass says what is odd about the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


class MergesOnEval(Stages):
    """Adds a product of low rank to a weight in eval mode, as LoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))
        self.merged = False

    def train(self, mode: bool = True) -> MergesOnEval:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.middle.weight += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = self.middle(x)
        return self.last(torch.relu(y if self.merged else y + F.linear(x, self.up @ self.down)))


class Folding(nn.Module):
    """Two branches that ``eval`` folds into one, through ``.data``, as RepVGG's do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.folded = nn.Linear(4, 4), nn.Linear(4, 4), False

    def eval(self) -> Folding:
        return self.train(False)

    def train(self, mode: bool = True) -> Folding:
        if mode == self.folded:
            sign = -1 if mode else 1
            self.one.weight.data = self.one.weight.data + sign * self.other.weight.data
            self.one.bias.data += sign * self.other.bias.data
            self.folded = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if self.folded else self.one(x) + self.other(x)


class Folds(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.middle = Folding()


class SwapsTheAverage(Stages):
    """Evaluates with an average of the weights, which it exchanges for the weights in ``eval``."""

    def __init__(self) -> None:
        super().__init__()
        self.average = {name: torch.randn_like(p) for name, p in self.named_parameters()}

    def train(self, mode: bool = True) -> SwapsTheAverage:
        if mode != self.training:
            for name, parameter in self.named_parameters():
                held = parameter.data.clone()
                parameter.data.copy_(self.average[name])
                self.average[name] = held
        return super().train(mode)


class ReplacesWhatItHas(Stages):
    """Sets new parameters and modules in ``train``."""

    def train(self, mode: bool = True) -> ReplacesWhatItHas:
        self.middle.weight = nn.Parameter(self.middle.weight.detach() * 2)
        self.last = nn.Linear(4, 3)
        self.register_buffer("mode", torch.tensor(mode))
        return super().train(mode)


class Counts(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log, self.recent, self.seen = 0, [], deque(maxlen=3), set()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.log.append(self.calls)
        self.recent.append(x)
        self.seen.add(self.training)
        return super().forward(x)


class Notes:
    def __init__(self) -> None:
        self.last, self.all = None, []


class Caches(Stages):
    """Keeps what it computes in a dict, in an object and on a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.notes = {"kept": torch.ones(2)}, Notes()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.cache["x"] = self.notes.last = self.middle.given = x
        self.notes.all.append(x)
        self.cache.setdefault("table", torch.arange(4.0))
        return self.last(torch.relu(self.middle(x + self.cache["table"])))


class HooksFillADict(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.features = {}
        self.first.register_forward_hook(lambda module, inputs, output: self.features.update(first=output))
        self.middle.register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.features.setdefault("before", []).append(inputs[0])


class ChangesItsClass(Stages):
    instances, calls, table = [], 0, {}

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        self.instances.append(x)
        self.table["x"] = x
        type(self).late = x
        return super().forward(x)


class HoldsALock(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.calls += 1
            return super().forward(x)


class PlainLists(Stages):
    """Parameters that lie in a list and in a dict, and are registered nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))]
        self.shifts = {"a": nn.Parameter(torch.rand(4)), "b": [torch.rand(4)]}

    def train(self, mode: bool = True) -> PlainLists:
        with torch.no_grad():
            self.scales[0] *= 2
            self.shifts["b"][0].add_(1)
        return super().train(mode)


class OldWeightNorm(Stages):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.first = nn.utils.weight_norm(self.first)
            self.middle = nn.utils.weight_norm(self.middle)


class OwnGenerator(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.middle = Jitter()


class Jitter(nn.Module):
    """Draws from a generator of its own, kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(4, generator=self.generator)


class HandsOnItsMode(Stages):
    """Tells another object of every change of mode, whose list is not an attribute of any module."""

    def __init__(self) -> None:
        super().__init__()
        self.log = []
        self.tell = (lambda log: lambda mode: log.append(mode))(self.log)

    def train(self, mode: bool = True) -> HandsOnItsMode:
        self.tell(mode)
        return super().train(mode)


MODELS = [
    MergesOnEval, Folds, SwapsTheAverage, ReplacesWhatItHas, Counts, Caches, HooksFillADict, ChangesItsClass,
    HoldsALock, PlainLists, OldWeightNorm, OwnGenerator, HandsOnItsMode,
]  # fmt: skip


def facts(model: nn.Module) -> dict[str, Any]:
    """All that is reached from a model, by paths: identities, and values of tensors, numbers and generators."""
    return dict(_facts("", model, set()))


def _facts(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    yield path, id(value)
    if isinstance(value, Tensor):
        yield f"{path}: values", (value.tolist(), value.requires_grad, value._version, id(value.grad))
    elif isinstance(value, torch.Generator):
        yield f"{path}: state", value.get_state().tolist()
    elif isinstance(value, bool | int | float | str | type | type(None) | types.ModuleType):
        yield f"{path}: value", value
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            yield f"{path}: keys", list(map(str, value))
            members = {f"[{key!r}]": member for key, member in value.items()}
        elif isinstance(value, list | tuple | set | deque):
            yield f"{path}: length", len(value)
            members = {f"[{index}]": member for index, member in enumerate(value)}
        elif isinstance(value, types.FunctionType):
            members = {f"({i})": cell.cell_contents for i, cell in enumerate(value.__closure__ or ())}
        elif isinstance(value, types.MethodType):
            members = {".self": value.__self__}
        else:
            members = {f".{name}": held for name, held in getattr(value, "__dict__", {}).items()}
            own = (
                {k: v for k, v in vars(type(value)).items() if not k.startswith("__")}
                if isinstance(value, Stages)
                else {}
            )
            members |= {f".class.{name}": held for name, held in own.items() if not callable(held)}
        for key, member in members.items():
            yield from _facts(path + key, member, seen)


def capture(model: nn.Module) -> None:
    fxcollab.capture(model, ["first"])


def choose(model: nn.Module) -> None:
    fxcollab.choose_splits(model, (X,), fanouts=(2,))


def costs(model: nn.Module) -> None:
    fxcollab.training_costs(model, splits=["middle"], example_inputs=(X,))


def transform_and_verify(model: nn.Module) -> None:
    fxcollab.verify(model, fxcollab.transform(model, splits=["middle"], seed=0, init="copy-anyway"), (X,))


LOOKS = (capture, choose, costs, transform_and_verify)


def made(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls()


@pytest.mark.parametrize("training", slow_but([True], [True, False]))
@pytest.mark.parametrize("cls", slow_but(MODELS[::2], MODELS))
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_looked_at_is_bit_for_bit_as_before(cls: type[nn.Module], training: bool) -> None:
    model = made(cls).train(training)
    before = facts(model)

    def changes() -> list[str]:
        now = facts(model)
        return [key for key in {**before, **now} if before.get(key, facts) != now.get(key, facts)]

    for look in LOOKS:
        with suppress(fxcollab.SplitError):  # where head 0 alone would follow the mode
            look(model)
        assert changes() == [], look.__name__


@pytest.mark.parametrize(("cls", "split"), [(MergesOnEval, "middle"), (Folds, "first"), (Folds, "middle")])
def test_models_whose_mode_changes_weights_are_proved(cls: type[nn.Module], split: str) -> None:
    model = made(cls).double()
    x = X.double()
    expected = [model.train(training)(x) for training in (True, False, True)]
    train_model = fxcollab.transform(model, splits=[split], seed=0, init="copy-anyway")
    for training, output in zip((True, False, True), expected, strict=True):
        assert torch.equal(fxcollab.all_heads(train_model.train(training))(x)[0], output)
    fxcollab.verify(model, train_model, (x,)).raise_if_failed()


@pytest.mark.parametrize("cls", [MergesOnEval, SwapsTheAverage, ReplacesWhatItHas])
def test_a_mode_that_changes_what_lies_behind_a_split_is_refused_where_the_heads_wouldnt_follow(cls: Any) -> None:
    model = made(cls)
    before = facts(model)
    with pytest.raises(fxcollab.SplitError, match="writes state behind a split") as caught:
        fxcollab.transform(model, splits=["first"], init="copy-anyway")
    assert "middle.weight" in str(caught.value.where)
    assert facts(model) == before


def test_what_that_refusal_advises_works() -> None:
    model = nn.Sequential(nn.Linear(4, 4), made(SwapsTheAverage), nn.Linear(3, 3))
    train_model = fxcollab.transform(model, splits=["0"], seed=0, init="copy-anyway")
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_what_cant_be_copied_is_shared_and_said() -> None:
    model = made(HoldsALock)
    captured = fxcollab.capture(model, ["first"])
    assert any(line.startswith("lock can't be copied") for line in captured.meta["fxcollab_limitations"])
    with pytest.warns(UserWarning, match="limitation: lock can't be copied"):
        train_model = fxcollab.transform(model, splits=["first"], seed=0)
    assert torch.equal(train_model(X)[0], model(X))
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


# ------------------------------------------------------------------------------------------- deep copies


def copied(value: Any) -> Any:
    return deep_copy(value, clone_of)[0]


class Marked(nn.Parameter):
    """A parameter with a class of its own."""


def test_ties_are_kept_in_copies() -> None:
    model = made(Stages)
    model.middle.weight = model.first.weight
    model.alias, model.rows, model.held = model.last, model.first.weight[:2], [model.first, model.first.weight]
    model.register_buffer("view", model.first.weight.detach()[0])
    copy = copied(model)
    assert copy.middle.weight is copy.first.weight is copy.held[1] is not model.first.weight
    assert copy.alias is copy.last is not model.last and copy.held[0] is copy.first


def test_functions_have_copies_of_what_they_hold() -> None:
    model = made(Stages)

    def closes(x: Tensor) -> Tensor:
        return model.first(x)

    def has_defaults(x: Tensor, layer: nn.Module = model.first, *, scale: Any = (model.last.weight,)) -> Any:
        return layer, scale[0]

    class Holder:
        def __init__(self) -> None:
            self.layer = model.middle

        def method(self) -> nn.Module:
            return self.layer

    model.closes, model.has_defaults, model.again = closes, has_defaults, closes
    model.part = functools.partial(has_defaults, X, model.middle)
    model.bound, model.method, model.plain = model.first.forward, Holder().method, torch.relu
    copy = copied(model)
    with torch.no_grad():
        copy.first.weight.zero_()
        copy.first.bias.fill_(2)
    assert copy.closes(X).eq(2).all() and copy.bound(X).eq(2).all() and not model.closes(X).eq(2).any()
    assert copy.again is copy.closes is not closes
    assert copy.has_defaults(X)[0] is copy.first and copy.has_defaults(X)[1] is copy.last.weight
    assert copy.part()[0] is copy.middle and copy.method() is copy.middle and copy.plain is torch.relu


def test_functions_that_hold_functions_and_themselves_are_copied() -> None:
    model = made(Stages)

    def inner() -> nn.Module:
        return model.first

    def outer(depth: int = 2) -> nn.Module:
        return inner() if depth == 0 else outer(depth - 1)

    def undecided() -> Any:
        return late

    model.outer, model.undecided = outer, undecided
    copy = copied(model)
    assert copy.outer() is copy.first is not model.first
    late = model.last
    assert undecided() is model.last


def test_modules_that_arent_registered_are_copied_with_their_functions_and_hooks() -> None:
    model, calls = made(Stages), []
    hidden = nn.Linear(4, 4)
    hidden.register_forward_hook(lambda module, inputs, output: calls.append(module))
    model.__dict__["hidden"], model.list, model.closes = hidden, [hidden], lambda x: hidden(x)
    model.calls = calls
    copy = copied(model)
    copy.closes(X)
    assert copy.list[0] is copy.hidden is not hidden
    assert copy.calls == [copy.hidden] and calls == []


def test_graph_modules_keep_what_their_classes_add() -> None:
    class Traced(fx.GraphModule):
        def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
            super().__init__(root, graph)
            self.notes, self.function = ["kept"], lambda: self.first

    model = made(Stages)
    model.inside = Traced(made(Stages), fx.symbolic_trace(made(Stages)).graph)
    copy = copied(model)
    assert copy.inside.notes == ["kept"] and copy.inside.notes is not model.inside.notes
    assert copy.inside.function() is copy.inside.first is not model.inside.first
    assert copy.inside.graph.owning_module is copy.inside and model.inside.graph.owning_module is model.inside
    assert torch.equal(copy.inside(X), model.inside(X))
    with torch.no_grad():
        copy.inside.last.bias.add_(1)
    assert not torch.equal(copy.inside(X), model.inside(X))


def test_subclasses_and_attributes_of_parameters_are_kept() -> None:
    model = made(Stages)
    model.marked = Marked(torch.ones(2))
    model.marked.note = "x"
    model.plain, model.frozen = [nn.Parameter(torch.ones(2))], nn.Parameter(torch.ones(2), requires_grad=False)
    copy = copied(model)
    assert isinstance(copy.marked, nn.Parameter) and copy.marked.note == "x"
    assert isinstance(copy.plain[0], nn.Parameter) and copy.plain[0] is not model.plain[0]
    assert not copy.frozen.requires_grad and copy.marked.requires_grad


def test_tensors_that_are_computed_from_others_are_copied() -> None:
    model = made(OldWeightNorm)
    copy = copied(model)
    assert not model.first.weight.is_leaf and torch.equal(copy(X), model(X))
    with torch.no_grad():
        copy.first.weight_g.zero_()
    assert not torch.equal(copy(X), model(X))


def test_generators_are_copied_with_their_state() -> None:
    model = made(OwnGenerator)
    copy = copied(model)
    assert torch.equal(copy(X), model(X)) and torch.equal(copy(X), model(X))


def test_copies_are_freed_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", collected.append)
    fxcollab.capture(Stages(), splits=("first",))
    assert not collected  # as it is where a twin's mode outlives the twin


def test_leaks_are_looked_for_among_what_the_own_thread_has_made() -> None:
    entered, made, kept = threading.Event(), threading.Event(), list[Any]()

    def other() -> None:
        entered.wait()
        kept.append(twin_of(nn.Linear(4, 4)))
        made.set()

    thread = threading.Thread(target=other)
    thread.start()
    with purge_leaks():
        entered.set()
        made.wait()
    thread.join()
    assert [name for name, _ in kept[0].model.named_parameters()] == ["weight", "bias"]


class Owner:
    """Releases what it owns when it is deleted."""

    def __init__(self, released: list[str]) -> None:
        self.released = released

    def __del__(self) -> None:
        self.released.append("released")


@pytest.mark.parametrize("where", ["attribute", "closure", "tensor"])
def test_what_releases_something_is_shared_and_nothing_is_released(where: str) -> None:
    released: list[str] = []
    model, owner = made(Stages), Owner(released)
    if where == "attribute":
        model.middle.owner = [owner]
        model.owner = owner
    elif where == "closure":
        model.middle.register_forward_hook(lambda module, args, output: owner and None)
    else:
        model.middle.weight.owner = owner
    captured = fxcollab.capture(model, ["first"])
    said = [line for line in captured.meta["fxcollab_limitations"] if line.startswith("owner can't be copied")]
    assert bool(said) is (where == "attribute")
    train_model = fxcollab.transform(model, splits=["first"], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    fxcollab.training_costs(model, "hierarchical", ["first"], example_inputs=(X,))
    gc.collect()
    assert not released
