"""Questions about types and sizes that an opened forward asks of its values."""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections.abc import Callable
from numbers import Number
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import CaptureError
from tests.speeds import slow_but
from tests.tracing.question_helpers import (
    MORE,
    THE_REAL_TORCH,
    Net,
    X,
    agrees,
    made,
    proven,
    proven_or_refused,
    refused,
)


class AsksItsSize(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(x * 2 if x.shape[0] > 5 else x)


class StacksItsRows(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(torch.stack([row * 2 for row in x]))


class CountsItsRows(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(x / int(x.shape[0]))


@pytest.mark.parametrize("make", slow_but([StacksItsRows], [AsksItsSize, StacksItsRows, CountsItsRows]))
def test_sizes_for_which_the_forward_goes_another_way_are_refused(make: type[Net]) -> None:
    model = make()
    train_model = proven(model)
    error = refused(lambda: train_model(MORE))
    assert "was captured where" in error.what
    refused(lambda: fxcollab.prune(train_model)(MORE))


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda x: x.shape[-1] in {8, 16}, marks=pytest.mark.slow),
        lambda x: x.dtype in {torch.float32},
        pytest.param(lambda x: {8: 1}.get(x.shape[-1], 0) == 1, marks=pytest.mark.slow),
        lambda x: {(4, 8): 1}.get(tuple(x.shape), 0) == 1,
        lambda x: str(x.dtype) == "torch.float32",
        pytest.param(lambda x: "cpu" in str(x.device), marks=pytest.mark.slow),
        lambda x: getattr(x, "mask", None) is None,
        pytest.param(lambda x: getattr(x, "shape", None) is not None, marks=pytest.mark.slow),
    ],
    ids=["size in a set", "dtype in a set", "key", "shape as key", "text", "device", "no attribute", "attribute"],
)
def test_what_python_asks_of_sizes_and_types_is_answered(ask: Callable[[Any], bool]) -> None:
    model = AsksOtherwise(ask)
    assert model.ask(X)
    train_model = proven(model)
    assert agrees(train_model, model, X)


@pytest.mark.slow
def test_a_forwards_own_handler_takes_no_question_for_an_answer() -> None:
    class Handles(Net):
        def forward(self, x: Any) -> Any:
            try:
                count = len(x)
            except Exception:
                count = 0
            return super().forward(x * count)

    proven(Handles())
    proven(Handles(), None)


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    "call",
    slow_but([_scripted], [_scripted, lambda x: torch.Tensor(x), lambda x: torch.Tensor._make_subclass(Tensor, x)]),
    ids=["scripted", "Tensor", "_make_subclass"],
)
def test_what_asks_from_c_is_refused_and_does_not_crash(call: Callable[[Any], Any]) -> None:
    class Calls(Net):
        def forward(self, x: Any) -> Any:
            return super().forward(call(self.a(x)))

    refused(lambda: made(Calls(), (X,)))


class TensorOrList(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(x * 2 if isinstance(x, torch.Tensor) else torch.stack(list(x)).mean(0))


@pytest.mark.parametrize("inputs", [(X,), None], ids=["given", "guessed"])
def test_an_input_is_a_tensor(inputs: Any) -> None:
    model = TensorOrList()
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert agrees(train_model, model, MORE)


@pytest.mark.slow
def test_an_input_whose_shape_is_unknown_is_a_tensor_all_the_same() -> None:
    class Two(Net):
        def forward(self, x: Any, y: Any) -> Any:
            return super().forward(x + y if isinstance(x, Tensor) and not isinstance(y, (list, tuple, dict)) else x)

    model = Two()
    train_model = made(model)
    assert agrees(train_model, model, X, X)
    fxcollab.verify(model, train_model, (X, X)).raise_if_failed()


class ListOrTensor(Net):
    def forward(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            x = x[0] - x[1]
        return super().forward(x[:2] * 2)


@pytest.mark.parametrize(
    "inputs", [([X, MORE[:4]],), pytest.param(((X, MORE[:4]),), marks=pytest.mark.slow)], ids=["list", "tuple"]
)
def test_an_input_is_a_list_where_the_example_is_one(inputs: Any) -> None:
    model = ListOrTensor()
    assert agrees(proven(model, inputs), model, *inputs)


@pytest.mark.parametrize("kind", ["FloatTensor", "LongTensor"])
def test_an_input_has_the_type_of_the_examples_elements(kind: str) -> None:
    class Typed(Net):
        def forward(self, x: Any) -> Any:
            return super().forward(x.float() * 2 if isinstance(x, getattr(torch, kind)) else x.float())

    model, inputs = Typed(), {"FloatTensor": (X,), "LongTensor": (torch.ones(2, 8, dtype=torch.int64),)}[kind]
    assert agrees(made(model, inputs), model, *inputs)


class Part(nn.Module):
    """Kept whole; returns one kind of value or another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        return {"tensor": h, "tuple": (h, x), "list": [h, x], "dict": {"h": h, "x": x}}[self.kind]


class AsksThePart(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.part = Part(kind)

    def forward(self, x: Tensor) -> Any:
        h = self.part(x)
        if isinstance(h, (list, tuple)):
            h = h[0] * (2 if isinstance(h, tuple) else 3)
        elif isinstance(h, dict):
            h = h["h"] - h["x"]
        elif isinstance(h, Tensor):
            h = h * 5
        return super().forward(h)


@pytest.mark.parametrize("inputs", slow_but([(X,)], [(X,), None]), ids=["given", "guessed"])
@pytest.mark.parametrize("kind", slow_but(["list", "dict"], ["tensor", "tuple", "list", "dict"]))
def test_what_a_module_kept_whole_returns_has_its_own_type(kind: str, inputs: Any) -> None:
    model = AsksThePart(kind)
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert agrees(train_model, model, MORE)


@pytest.mark.parametrize("split", slow_but(["part.layer"], ["part", "part.layer", "c"]))
def test_types_are_told_behind_a_split_and_in_an_opened_module(split: str) -> None:
    proven(AsksThePart("tuple"), splits=[split])
    proven(AsksThePart("tensor"), splits=[split], granularity="op")


class PairInTraining(Part):
    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        return (h, x) if self.training else h


def test_a_type_may_differ_between_the_modes() -> None:
    model = AsksThePart("tensor")
    model.part = PairInTraining("tensor")
    train_model = proven(model)
    for training in (True, False):
        assert agrees(train_model.train(training), model.train(training), MORE)


class AsksItsState(Net):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((8,), 2.0))
        self.mean: Tensor
        self.register_buffer("mean", torch.full((8,), 3.0))
        self.missing = None

    def forward(self, x: Tensor, y: Tensor) -> Any:
        x = x * self.w if isinstance(self.w, nn.Parameter) else x + y
        x = x - y if isinstance(self.mean, nn.Parameter) else x - self.mean
        x = x if isinstance(self.missing, nn.Parameter) else x * 2
        return super().forward(x + y if isinstance(self.mean, Tensor) else x)


@pytest.mark.parametrize("inputs", [(X, X), None], ids=["given", "of unknown shape"])
def test_a_parameter_is_a_parameter_and_a_buffer_none(inputs: Any) -> None:
    model = AsksItsState()
    train_model = made(model, inputs)
    assert agrees(train_model, model, MORE, 2 * MORE)


def test_a_question_for_a_parameter_is_proved() -> None:
    proven(AsksItsState(), (X, 2 * X))


class AsksSizes(Net):
    def forward(self, x: Tensor) -> Any:
        wide = x.shape[1] if isinstance(x.shape[1], int) and not isinstance(x.shape[1], Tensor) else 0
        sizes = len(x.shape) if isinstance(x.shape, torch.Size) and isinstance(x.shape, tuple) else 0
        return super().forward(x * wide / sizes)


@pytest.mark.slow
def test_sizes_are_numbers_in_a_tuple() -> None:
    model = AsksSizes()
    assert agrees(proven(model), model, MORE)


class AsksOtherwise(Net):
    """Asks for the type without the name ``isinstance``."""

    def __init__(self, ask: Callable[[Any], bool]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 2 if self.ask(x) else x * 3)


@functools.singledispatch
def _dispatched(x: Any) -> bool:
    return False


@_dispatched.register
def _(x: Tensor) -> bool:
    return True


def _matches(x: Any) -> bool:
    match x:
        case Tensor():
            return True
    return False


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: torch.is_tensor(x),
        lambda x: hasattr(x, "logits"),
        pytest.param(lambda x: hasattr(x, "shape"), marks=pytest.mark.slow),
        lambda x: type(x) is Tensor,
        lambda x: issubclass(type(x), Tensor),
        pytest.param(lambda x: callable(x), marks=pytest.mark.slow),
        pytest.param(lambda x: x.__class__ is Tensor, marks=pytest.mark.slow),
        pytest.param(lambda x: isinstance(type(x), type), marks=pytest.mark.slow),
        pytest.param(
            lambda x: type(x) is type(torch.ones(1)) and type(type(x)) is not Tensor, marks=pytest.mark.slow
        ),
        _matches,
        _dispatched,
        lambda x: isinstance(x, Callable),  # type: ignore[arg-type]
        lambda x: isinstance(x.shape[0], Number) or isinstance(x, Number),
    ],
    ids=[
        "is_tensor",
        "hasattr",
        "has shape",
        "type is",
        "issubclass",
        "callable",
        "class is",
        "type of type",
        "type is type of",
        "match",
        "singledispatch",
        "abstract class",
        "number",
    ],
)
def test_a_type_that_is_asked_for_otherwise_is_told_or_refused(ask: Callable[[Any], bool]) -> None:
    proven_or_refused(AsksOtherwise(ask))


def test_a_function_of_another_package_is_told_the_type_too(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("another_library_of_functions")
    exec("import torch\ndef is_array(x):\n    return isinstance(x, torch.Tensor)", vars(library))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    proven_or_refused(AsksOtherwise(library.is_array))


class WritesIntoAPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, (list, tuple)):
            x[0].mul_(2)
            x = x[0] + x[1]
        return self.layer(x)


class HandsOnAPair(Net):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.writes = Part("tuple"), WritesIntoAPair()

    def forward(self, x: Tensor) -> Any:
        return self.d(self.writes(self.part(x)))


def test_a_write_behind_a_question_for_the_type_is_seen() -> None:
    proven_or_refused(HandsOnAPair(), splits=["part"])


class Fails(Net):
    def forward(self, x: Any) -> Any:
        if isinstance(x, Tensor) and torch.finfo(x.dtype).bits:
            raise ValueError("as it is meant to")
        return x


class FailsAtTheEnd(Net):
    def forward(self, x: Any) -> Any:
        return object() if isinstance(self.a(x), Tensor) else x


@pytest.mark.parametrize("make", [TensorOrList, AsksItsState, Fails, FailsAtTheEnd])
def test_the_globals_of_the_models_code_are_as_before(make: type[Net]) -> None:
    before, inputs = dict(globals()), (X, X) if make is AsksItsState else (X,)
    failed = False
    try:
        fxcollab.capture(make(), ["b"], inputs)
    except CaptureError:
        failed = True
    assert failed == make.__name__.startswith("Fails")
    assert globals().keys() == before.keys()
    assert all(globals()[name] is value for name, value in before.items())
    assert "isinstance" not in globals() and isinstance is builtins.isinstance
    assert torch is THE_REAL_TORCH is sys.modules["torch"]


def test_a_modules_own_isinstance_is_its_own_during_and_after_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(value: Any, kinds: Any) -> bool:
        return builtins.isinstance(value, (kinds, fx.Proxy))

    monkeypatch.setitem(globals(), "isinstance", mine)
    model = TensorOrList()
    assert agrees(made(model), model, MORE)
    assert globals()["isinstance"] is mine
