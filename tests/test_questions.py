"""What an opened forward asks of its values: answered as the model would, noted, or refused; never wrongly."""

from __future__ import annotations

import builtins
import copy
import functools
import linecache
import pickle
import random
import re
import sys
import types
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import CaptureError, CollabGraphModule, SplitError
from tests.untouched import Untouched

THE_REAL_TORCH, THE_REAL_FINFO, THE_REAL_ONES = torch, torch.finfo, torch.ones
X = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.1
MORE = torch.rand(7, 8, generator=torch.Generator().manual_seed(1)) + 0.1
NOTES = "fxcollab_limitations"


def bug(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, reason=reason)


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    """Threads cost more than they give on networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Four layers; the split is at the second, and the heads are the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        return self.tail(self.a(x))

    def tail(self, h: Tensor) -> Any:
        return self.d(self.c(self.b(h)).relu())


def made(model: nn.Module, inputs: Any = None, splits: Sequence[str] = ("b",), **options: Any) -> CollabGraphModule:
    """The training model of two heads; what was given up is not warned of here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "limitation")
        return fxcollab.transform(model, "simple", splits, example_inputs=inputs, seed=0, **options)


def proven(model: nn.Module, inputs: Any = (X,), splits: Sequence[str] = ("b",), **options: Any) -> CollabGraphModule:
    """The training model, after every line of the proof was seen to hold."""
    train_model = made(model, inputs, splits, **options)
    fxcollab.verify(model, train_model, inputs).raise_if_failed()
    return train_model


def proven_or_refused(model: nn.Module, inputs: Any = (X,), splits: Sequence[str] = ("b",)) -> None:
    """A refusal is fine where a wrong training model is the alternative."""
    try:
        train_model = made(model, inputs, splits)
    except (CaptureError, SplitError) as error:
        assert error.why and error.hint
        return
    fxcollab.verify(model, train_model, inputs).raise_if_failed()


def agrees(train_model: nn.Module, model: nn.Module, *inputs: Any) -> bool:
    """Whether head 0 returns what the model does; each gets inputs of its own."""
    return torch.equal(train_model(*copy.deepcopy(inputs))[0], model(*copy.deepcopy(inputs)))


def line_at(where: str | None) -> str:
    """The text of this file's line that an error names, as a path or as a module."""
    place = re.match(r"(.*):(\d+)(, in .*)?$", str(where))
    assert place and place[1] in (__file__, __name__), where
    return linecache.getline(__file__, int(place[2])).strip()


def refused(call: Callable[[], Any]) -> CaptureError:
    """The refusal, which says all that it should."""
    with pytest.raises(CaptureError) as caught:
        call()
    error = caught.value
    assert error.what and error.where and error.why and error.hint
    return error


def targets(train_model: CollabGraphModule) -> list[Any]:
    return [node.target for node in train_model.graph.nodes if node.op.startswith("call_")]


# ----------------------------------------------------------------------------------------- 1. types


class AsksItsSize(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(x * 2 if x.shape[0] > 5 else x)


class StacksItsRows(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(torch.stack([row * 2 for row in x]))


class CountsItsRows(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(x / int(x.shape[0]))


@pytest.mark.parametrize("make", [AsksItsSize, StacksItsRows, CountsItsRows])
def test_sizes_for_which_the_forward_goes_another_way_are_refused(make: type[Net]) -> None:
    model = make()
    train_model = proven(model)
    error = refused(lambda: train_model(MORE))
    assert "was captured where" in error.what
    refused(lambda: fxcollab.prune(train_model)(MORE))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.shape[-1] in {8, 16},
        lambda x: x.dtype in {torch.float32},
        lambda x: {8: 1}.get(x.shape[-1], 0) == 1,
        lambda x: {(4, 8): 1}.get(tuple(x.shape), 0) == 1,
        lambda x: str(x.dtype) == "torch.float32",
        lambda x: "cpu" in str(x.device),
        lambda x: getattr(x, "mask", None) is None,
        lambda x: getattr(x, "shape", None) is not None,
    ],
    ids=["size in a set", "dtype in a set", "key", "shape as key", "text", "device", "no attribute", "attribute"],
)
def test_what_python_asks_of_sizes_and_types_is_answered(ask: Callable[[Any], bool]) -> None:
    model = AsksOtherwise(ask)
    assert model.ask(X)
    train_model = proven(model)
    assert agrees(train_model, model, X)


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
    [_scripted, lambda x: torch.Tensor(x), lambda x: torch.Tensor._make_subclass(Tensor, x)],
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


@pytest.mark.parametrize("inputs", [([X, MORE[:4]],), ((X, MORE[:4]),)], ids=["list", "tuple"])
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


@pytest.mark.parametrize("inputs", [(X,), None], ids=["given", "guessed"])
@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
def test_what_a_module_kept_whole_returns_has_its_own_type(kind: str, inputs: Any) -> None:
    model = AsksThePart(kind)
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert agrees(train_model, model, MORE)


@pytest.mark.parametrize("split", ["part", "part.layer", "c"])
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
        lambda x: hasattr(x, "shape"),
        lambda x: type(x) is Tensor,
        lambda x: issubclass(type(x), Tensor),
        lambda x: callable(x),
        lambda x: x.__class__ is Tensor,
        lambda x: isinstance(type(x), type),
        lambda x: type(x) is type(torch.ones(1)) and type(type(x)) is not Tensor,
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


# ------------------------------------------------------------------------------- 2. what only data can answer


class AsksTheSum(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        if x.sum() > 0:  # asks
            h = h * 2
        return self.tail(h)


class AsksForAnInteger(Net):
    def forward(self, x: Tensor) -> Any:
        count = int(x.round().max())  # asks
        return self.tail(self.a(x) * count)


class AsksForARange(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        for _ in range(x.round().max().long().item()):  # asks
            h = h * 2
        return self.tail(h)


class AsksForAFloat(Net):
    def forward(self, x: Tensor) -> Any:
        return self.tail(self.a(x) / float(x.round().max()))  # asks


def test_a_float_that_data_decide_is_refused_for_every_input_has_another() -> None:
    error = refused(lambda: made(AsksForAFloat(), (ONES,)))
    assert line_at(error.where).endswith("# asks")
    assert "depends on the data" in str(error.why)


class AsksForAList(Net):
    def forward(self, x: Tensor) -> Any:
        rows = x[:, 0].tolist()
        return self.tail(self.a(x) * len(rows))  # asks


class AsksForACount(Net):
    def forward(self, x: Tensor) -> Any:
        found = x.round().nonzero()
        return self.tail(self.a(x) + len(found))  # asks


class AsksWhatIsTrue(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        h = h * 2 if x.max() > 0 and not (x < 0).any() else h  # asks
        return self.tail(h)


ONES = torch.ones(4, 8)
QUESTIONS = [
    # the model, the question, an input that answers as the example ONES does, and one that doesn't
    pytest.param(AsksTheSum, "bool(...) is True; here it is False", MORE, -ONES, id="bool"),
    pytest.param(AsksForAnInteger, "int(...) is 1; here it is 3", torch.full((7, 8), 1.2), 3 * ONES, id="int"),
    pytest.param(AsksForARange, "index(...) is 1; here it is 3", torch.full((7, 8), 1.2), 3 * ONES, id="range"),
    pytest.param(AsksForAList, "len(...) is 4; here it is 7", MORE[:4], MORE, id="len of tolist"),
    pytest.param(AsksForACount, "len(...) is 32; here it is 24", torch.rand(4, 8) + 1, ONES[:3], id="len"),
    pytest.param(AsksWhatIsTrue, "bool(...) is False; here it is True", MORE, MORE - 0.5, id="and not any"),
]


@pytest.mark.parametrize(("make", "question", "same", "other"), QUESTIONS)
def test_where_data_decide_the_examples_do_and_other_inputs_are_refused(
    make: type[Net], question: str, same: Tensor, other: Tensor
) -> None:
    model = make()
    with pytest.warns(
        UserWarning, match=r"^limitation: what .*test_questions.py:\d+ asks was decided .* are refused"
    ):
        train_model = fxcollab.transform(model, "simple", ["b"], example_inputs=(ONES,), seed=0)
    for inputs in (ONES, same):
        fxcollab.verify(model, train_model, (inputs,)).raise_if_failed()
        assert agrees(train_model, model, inputs)
    for graph in (train_model, train_model.eval(), fxcollab.prune(train_model), copy.deepcopy(train_model)):
        error = refused(lambda graph=graph: graph(other))
        assert question in error.what
        assert line_at(error.where).endswith("# asks")


@pytest.mark.parametrize("make", [AsksTheSum, AsksForAnInteger, AsksForARange, AsksForAFloat, AsksForACount])
def test_where_data_decide_guessed_inputs_dont(make: type[Net]) -> None:
    error = refused(lambda: made(make()))
    assert error.what == f"The forward of {make.__name__} can't be captured."
    assert line_at(error.where).endswith("# asks")
    assert "example_inputs" in str(error.hint)


def test_where_data_decide_a_model_without_data_is_refused() -> None:
    error = refused(lambda: made(AsksTheSum().to("meta"), (ONES.to("meta"),)))
    assert line_at(error.where).endswith("# asks")


class AsksInTraining(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return self.tail(h * 2 if self.training and x.sum() > 0 else h)


def test_a_question_of_one_mode_is_asked_in_that_mode_alone() -> None:
    model = AsksInTraining()
    train_model = proven(model, (ONES,))
    refused(lambda: train_model(-ONES))
    assert agrees(train_model.eval(), model.eval(), -ONES)


class AsksAndIsAsked(Net):
    """Sizes are asked for where data are, too."""

    def forward(self, x: Tensor) -> Any:
        batch, width = x.shape
        h = self.a(x) if x.sum() > 0 else x
        if width != 8 or batch < 2:
            raise ValueError(f"not {tuple(x.shape)}")
        return self.tail(h.view(batch, width))


def test_sizes_stay_symbolic_where_data_decide_something_else() -> None:
    model = AsksAndIsAsked()
    train_model = proven(model)
    assert agrees(train_model, model, MORE)
    refused(lambda: train_model(MORE[:1]))


class AsksItsOwnState(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.c(self.b(self.a(x)))
        if self.c.bias.sum() > 0:
            h = h * 2
        return self.d(h)


def test_a_head_whose_own_state_answers_otherwise_is_refused() -> None:
    model = AsksItsOwnState()
    nn.init.ones_(model.c.bias)
    train_model = made(model, (X,), init="copy-anyway")
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    nn.init.constant_(train_model.peers.b1.c.bias, -1.0)
    refused(lambda: train_model(X))
    assert torch.equal(fxcollab.prune(train_model)(X), model(X))


class Busy(Net):
    """Asks for data behind statistics, random numbers and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        x.mul_(2)
        h = self.drop(self.norm(self.a(x)))
        if x.sum() > 0:
            h = h * 2
        return self.tail(h)


def test_computing_the_answers_leaves_model_and_examples_as_they_are() -> None:
    model, x = Busy(), X.clone()
    untouched = Untouched(model)
    fxcollab.capture(model, ["b"], (x,))
    assert untouched.differences() == []
    assert torch.equal(x, X) and x._version == 0
    proven(model, (x,))
    assert untouched.differences() == []
    assert torch.equal(x, X)


def test_a_graph_with_an_assumption_is_pickled() -> None:
    train_model = made(AsksTheSum(), (X,))
    loaded = pickle.loads(pickle.dumps(train_model))
    assert torch.equal(loaded(MORE)[1], train_model(MORE)[1])
    refused(lambda: loaded(-X))


# -------------------------------------------------------------------------------- 3. lists and dicts as inputs


class AddsImages(Net):
    def forward(self, images: Any) -> Any:
        return self.tail(sum(self.a(image) for image in images))


class WeighsImages(Net):
    def forward(self, images: Any) -> Any:
        h = 0
        for i, (image, weight) in enumerate(zip(images, (1.0, 2.0, 3.0), strict=False)):
            h = h + self.a(image) * weight + i
        return self.tail(h / len(images))


class StacksImages(Net):
    def forward(self, images: Any) -> Any:
        return self.tail(self.a(torch.stack(images).sum(0)) / len(images))


class ComprehendsImages(Net):
    def forward(self, images: Any) -> Any:
        first, *others = [self.a(image) for image in images]
        return self.tail(first - sum(others))


OF_LISTS = [AddsImages, WeighsImages, StacksImages, ComprehendsImages]


@pytest.mark.parametrize("make", OF_LISTS)
def test_a_list_is_an_input_of_its_length(make: type[Net]) -> None:
    model = make()
    train_model = proven(model, ([X, 2 * X],))
    assert any("others that answer differently are refused" in note for note in train_model.meta[NOTES])
    assert agrees(train_model, model, [MORE, 3 * MORE])
    for number in (1, 3):
        error = refused(lambda number=number: train_model([X] * number))
        assert f"len(...) is 2; here it is {number}" in error.what
        assert line_at(error.where)


def test_a_list_is_given_by_name_too() -> None:
    model = AddsImages()
    proven(model, {"images": [X, 2 * X]})


class ReadsABatch(Net):
    def forward(self, batch: Any) -> Any:
        h = 0
        for item in batch["items"]:
            h = h + self.a(item["image"]) * item["weight"]
        return self.tail(h)


def batch_of(number: int, image: Tensor = X) -> dict[str, Any]:
    return {"items": [{"image": image + i, "weight": torch.tensor(1.0 + i)} for i in range(number)]}


def test_a_dict_of_lists_of_dicts_is_an_input() -> None:
    model = ReadsABatch()
    train_model = proven(model, (batch_of(2),))
    assert agrees(train_model, model, batch_of(2, MORE))


class SkipsTheFirst(Net):
    def forward(self, images: Any) -> Any:
        return self.tail(self.a(images[0]) + sum(image for image in images[1:]))


class AddsLists(Net):
    def forward(self, images: Any) -> Any:
        return self.tail(sum(self.a(image) for row in images for image in row))


class AddsByKey(Net):
    def forward(self, images: Any) -> Any:
        return self.tail(sum(self.a(images[key]) for key in images))


class AddsItems(Net):
    def forward(self, images: Any) -> Any:
        return self.tail(sum(self.a(image) for _, image in images.items()))


class AddsValues(Net):
    def forward(self, images: Any) -> Any:
        return self.tail(sum(self.a(image) for image in images.values()))


class LooksForAMask(Net):
    def forward(self, batch: Any) -> Any:
        h = self.a(batch["x"])
        return self.tail(h * batch["mask"] if "mask" in batch else h)


@pytest.mark.parametrize(
    ("make", "example", "other"),
    [
        pytest.param(ReadsABatch, batch_of(2), batch_of(3), id="a list in a dict"),
        pytest.param(AddsImages, (X, X), (X, X, X), id="a tuple"),
        pytest.param(SkipsTheFirst, [X, X], [X, X, X], id="a part of a list"),
        pytest.param(AddsLists, [[X, X], [X]], [[X, X], [X, X]], id="a list in a list"),
        pytest.param(AddsByKey, {"a": X, "b": X}, {"a": X, "b": X, "c": X}, id="the keys of a dict"),
        pytest.param(AddsItems, {"a": X, "b": X}, {"a": X, "b": X, "c": X}, id="the items of a dict"),
        pytest.param(AddsValues, {"a": X, "b": X}, {"a": X, "b": X, "c": X}, id="the values of a dict"),
        pytest.param(LooksForAMask, {"x": X}, {"x": X, "mask": X}, id="a key in a dict"),
    ],
)
def test_another_number_of_parts_is_refused_wherever_the_parts_are(make: type[Net], example: Any, other: Any) -> None:
    model = make()
    train_model = made(model, (example,))
    assert agrees(train_model, model, example)
    refused(lambda: train_model(other))


@pytest.mark.parametrize("make", [AddsByKey, AddsItems, AddsValues, LooksForAMask])
def test_a_dict_is_an_input_of_its_keys(make: type[Net]) -> None:
    model = make()
    example = {"x": X, "mask": 2 * X}
    train_model = proven(model, (example,))
    assert agrees(train_model, model, {"x": MORE, "mask": 3 * MORE})


class MaybeMasked(Net):
    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key = key

    def forward(self, batch: Any) -> Any:
        h, mask = self.a(batch[0]), batch[self.key]
        return self.tail(h if mask is None else h * 2)


@pytest.mark.parametrize("example", [[X, None], (X, None), {0: X, 1: None}], ids=["list", "tuple", "dict"])
def test_a_part_of_an_input_that_is_none_is_none(example: Any) -> None:
    proven_or_refused(MaybeMasked(1), (example,))


def test_what_takes_a_list_is_loaded_with_an_example(tmp_path: Any) -> None:
    inputs = ([X, X],)
    train_model = made(AddsImages, inputs)
    fxcollab.save(train_model, tmp_path / "saved")
    with pytest.raises(fxcollab.FxCollabError) as caught:
        fxcollab.load(tmp_path / "saved")
    assert "example_inputs" in str(caught.value.hint)
    loaded = fxcollab.load(tmp_path / "saved", example_inputs=inputs)
    assert torch.equal(loaded(*inputs)[1], train_model(*inputs)[1])


class AsksWhetherAllArePositive(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return self.tail(h * 2 if (x > 0).all() else h)


@pytest.mark.parametrize("positive", [True, False])
def test_what_asks_for_data_is_loaded_where_others_of_that_shape_answer_alike(positive: bool, tmp_path: Any) -> None:
    inputs = (X if positive else X - 0.5,)  # no random normal numbers are all positive
    train_model = made(AsksWhetherAllArePositive, inputs)
    fxcollab.save(train_model, tmp_path / "saved")
    if positive:
        with pytest.raises(fxcollab.FxCollabError) as caught:
            fxcollab.load(tmp_path / "saved")
        assert "example_inputs" in str(caught.value.hint)
    else:
        assert torch.equal(fxcollab.load(tmp_path / "saved")(*inputs)[1], train_model(*inputs)[1])
    loaded = fxcollab.load(tmp_path / "saved", example_inputs=inputs)
    assert torch.equal(loaded(*inputs)[1], train_model(*inputs)[1])


def test_the_proof_asks_for_inputs_where_they_are_lists() -> None:
    model = AddsImages()
    train_model = proven(model, ([X, X],))
    refused(lambda: fxcollab.verify(model, train_model))


# ------------------------------------------------------------------------------ 4. factories, finfo and the like


class LowestNumbers(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x) + torch.finfo(x.dtype).eps * 1000
        return self.tail(torch.softmax(h.masked_fill(x > 0.5, torch.finfo(h.dtype).min), -1))


class LowestNumbersOfAHead(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.c(self.b(self.a(x)))
        limits = torch.finfo(h.dtype)
        return self.d(h.clamp(limits.min, limits.max).masked_fill(x > 0.5, limits.min).softmax(-1) + limits.eps)


@pytest.mark.parametrize("make", [LowestNumbers, LowestNumbersOfAHead])
def test_the_limits_of_a_type_are_those_of_the_input_at_hand(make: type[Net]) -> None:
    model = make()
    train_model = proven(model)
    assert torch.finfo in targets(train_model)
    assert train_model.meta[NOTES] == ()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        train_model.to(dtype)
        assert agrees(train_model, model, MORE.to(dtype))


def test_what_asks_nothing_is_loaded(tmp_path: Any) -> None:
    train_model = made(LowestNumbers, (X,))  # type: ignore[arg-type]
    fxcollab.save(train_model, tmp_path / "saved")
    assert torch.equal(fxcollab.load(tmp_path / "saved")(MORE)[1], train_model(MORE)[1])


FACTORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "ones of sizes": lambda x: torch.ones(x.shape[0], x.shape[1], device=x.device),
    "ones of unpacked sizes": lambda x: torch.ones(*x.shape, dtype=x.dtype),
    "ones of a tuple": lambda x: torch.ones((x.shape[0], 8), dtype=x.dtype, device=x.device),
    "ones of a size": lambda x: torch.ones(x.size()),
    "zeros": lambda x: torch.zeros(x.shape[0], 4).repeat(1, 2),
    "full": lambda x: torch.full((x.shape[0], 1), 2.5),
    "empty": lambda x: torch.empty(x.shape[0], 1, dtype=x.dtype).fill_(3),
    "arange": lambda x: torch.arange(x.shape[0], device=x.device)[:, None],
    "linspace": lambda x: torch.linspace(0, 1, x.shape[0])[:, None],
    "tensor": lambda x: torch.tensor([x.shape[0]], device=x.device),
    "iinfo": lambda x: torch.tensor(torch.iinfo(x.long().dtype).bits),
}


class Makes(Net):
    def __init__(self, make: str) -> None:
        super().__init__()
        self.make = FACTORIES[make]

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.a(x) + self.make(x))


@pytest.mark.parametrize("inputs", [(X,), None], ids=["given", "guessed"])
@pytest.mark.parametrize("make", FACTORIES)
def test_a_tensor_that_is_made_has_the_size_of_the_input_at_hand(make: str, inputs: Any) -> None:
    model = Makes(make)
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert agrees(train_model, model, MORE)
    assert train_model.meta[NOTES] == ()


@pytest.mark.parametrize("name", ["rand", "randn", "randint"])
@pytest.mark.parametrize("split", ["a", "b", "c"])
def test_random_tensors_are_drawn_at_every_call(name: str, split: str) -> None:
    class Draws(Net):
        def forward(self, x: Tensor) -> Any:
            bounds = (0, 9) if name == "randint" else ()
            sizes = (x.shape[0], 1)
            noise = getattr(torch, name)(*bounds, sizes) if bounds else getattr(torch, name)(*sizes, device=x.device)
            return self.d(self.c(self.b(self.a(x)) + noise))

    train_model = proven(Draws(), splits=[split])
    first, second = train_model(MORE)[0], train_model(MORE)[0]
    assert first.shape == (7, 4) and not torch.equal(first, second)


class AsksTheLimits(Net):
    """Asks about what is recorded."""

    def forward(self, x: Tensor) -> Any:
        x = x * 2 if torch.finfo(x.dtype).bits == 32 else x * 3
        return super().forward(x * 2 if len(torch.zeros(x.shape[0], 3)[0]) == 3 else x)


def test_questions_about_what_is_recorded_are_answered() -> None:
    model = AsksTheLimits()
    assert agrees(made(model, (X,)), model, X)
    assert agrees(made(model), model, MORE)


SEEN: list[bool] = []
"""Of no module or class, whose containers hold again what they held before a capture."""


class LooksAround(Net):
    """What others see of torch while the trace lasts."""

    def forward(self, x: Tensor) -> Any:
        import imported_in_a_forward as lazy  # type: ignore[import-not-found]

        real = sys.modules["torch"]
        SEEN.append(real is THE_REAL_TORCH and real.finfo is THE_REAL_FINFO and real.ones is THE_REAL_ONES)
        SEEN.append(lazy.found == (THE_REAL_FINFO, THE_REAL_ONES))
        assert lazy.torch.finfo(torch.float32).bits == 32
        return super().forward(x + torch.finfo(x.dtype).eps + torch.ones(x.shape[0], 1))


@pytest.fixture
def lazily(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes a module that is imported nowhere yet."""

    def write(source: str) -> None:
        (tmp_path / "imported_in_a_forward.py").write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    sys.modules.pop("imported_in_a_forward", None)


def test_torch_itself_is_never_changed(lazily: Callable[[str], None]) -> None:
    lazily("import torch\nfound = (torch.finfo, torch.ones)\n")
    SEEN.clear()
    train_model = proven(LooksAround())
    assert SEEN and all(SEEN)
    assert torch.finfo is THE_REAL_FINFO and torch.ones is THE_REAL_ONES
    assert torch.finfo in targets(train_model) and torch.ones in targets(train_model)


class ImportsEverything(Net):
    def forward(self, x: Tensor) -> Any:
        import imported_in_a_forward  # noqa: F401

        return super().forward(x)


def test_a_module_that_takes_over_the_names_gets_the_real_ones(lazily: Callable[[str], None]) -> None:
    lazily(f"from {__name__} import *\n")
    fxcollab.capture(ImportsEverything(), ["b"])
    lazy = vars(sys.modules["imported_in_a_forward"])
    assert lazy["torch"] is THE_REAL_TORCH and "isinstance" not in lazy


# ---------------------------------------------------------------------------- 5. modules made inside a forward


class MakesAModule(Net):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.make()(self.a(x)))
        return self.d(self.c(self.make()(h)))


@pytest.mark.parametrize(
    "make",
    [
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        lambda: nn.Softmax(dim=-1),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Sequential(nn.Hardtanh(), nn.Flatten())),
        lambda: nn.LayerNorm(8, elementwise_affine=False),
        lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False),
        lambda: nn.Dropout(0.5),
    ],
    ids=["ReLU", "ReLU in place", "Softmax", "Sequential", "LayerNorm", "BatchNorm", "Dropout"],
)
def test_a_module_without_state_may_be_made_inside(make: Callable[[], nn.Module]) -> None:
    model = MakesAModule(make)
    train_model = proven(model)
    assert list(train_model.state_dict())[: len(model.state_dict())] == list(model.state_dict())
    if not isinstance(make(), nn.Dropout):
        assert agrees(train_model, model, MORE)


def test_pooling_may_be_made_inside() -> None:
    class Pools(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            return self.tail(nn.MaxPool1d(2)(torch.cat([h, h * 2], 1)[:, None]).flatten(1))

    model = Pools()
    assert agrees(proven(model), model, MORE)


class HidesALayer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(8, 8)]

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.hidden[0](self.a(x)))  # hides


class MakesStatistics(Net):
    def forward(self, x: Tensor) -> Any:
        return self.tail(nn.BatchNorm1d(8)(self.a(x)))  # makes


class WrapsItsOwnLayers(Net):
    def forward(self, x: Tensor) -> Any:
        return self.d(nn.Sequential(self.b, nn.ReLU(), self.c)(self.a(x)))  # wraps


@pytest.mark.parametrize("inputs", [(X,), None], ids=["given", "guessed"])
@pytest.mark.parametrize(
    ("make", "kind", "comment"),
    [
        (HidesALayer, "a Linear with state (weight)", "# hides"),
        (MakesStatistics, "a BatchNorm1d with state (", "# makes"),
        (WrapsItsOwnLayers, "a Sequential with state (0.weight)", "# wraps"),
    ],
)
def test_a_module_with_state_that_is_no_submodule_is_refused(
    make: type[Net], kind: str, comment: str, inputs: Any
) -> None:
    error = refused(lambda: made(make(), inputs, ["a"]))
    assert kind in str(error.why) and "is no submodule: the forward makes or hides it" in str(error.why)
    assert line_at(error.where).endswith(comment)
    assert "module" in str(error.hint)


class DrawsItsWeights(Net):
    """Weights that are drawn at every call, and never trained."""

    def forward(self, x: Tensor) -> Any:
        return self.tail(nn.Linear(8, 8)(self.a(x)))


def test_weights_made_inside_are_drawn_at_every_call() -> None:
    train_model = proven(DrawsItsWeights())
    assert not torch.equal(train_model(X)[0], train_model(X)[0])


# ---------------------------------------------------------------------------------- 6. parts that are None


class HasNone(nn.Module):
    """Kept whole; a part of what it returns is None, always or where it isn't trained."""

    def __init__(self, kind: str = "pair", also_in_training: bool = True) -> None:
        super().__init__()
        self.layer, self.kind, self.also_in_training = nn.Linear(8, 8), kind, also_in_training

    def forward(self, x: Tensor) -> Any:
        h, other = self.layer(x), x if self.training and not self.also_in_training else None
        return {
            "pair": (h, other), "three": (h, other, x), "dict": {"h": h, "other": other}, "named": Named(h, other),
            "fields": Fields(h, other), "none": other,
        }[self.kind]  # fmt: skip


Named = namedtuple("Named", "h other")


@dataclass
class Fields:
    h: Tensor
    other: Tensor | None


class Unpacks(Net):
    kind = "pair"

    def __init__(self, also_in_training: bool = True) -> None:
        super().__init__()
        self.part = HasNone(self.kind, also_in_training)

    def forward(self, x: Tensor) -> Any:
        a, b = self.parts(x)
        return self.tail(b * 3 if b is not None else a * 2)

    def parts(self, x: Tensor) -> Any:
        a, b = self.part(x)
        return a, b


class Indexes(Unpacks):
    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs[0], outputs[1]


class UnpacksASlice(Unpacks):
    kind = "three"

    def parts(self, x: Tensor) -> Any:
        a, b = self.part(x)[:2]
        return a, b


class IndexesASlice(Unpacks):
    kind = "three"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)[:2]
        return outputs[0], outputs[-1]


class LooksUp(Unpacks):
    kind = "dict"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs["h"], outputs["other"]


class UnpacksNames(Unpacks):
    kind = "named"


NONES = [Unpacks, Indexes, UnpacksASlice, IndexesASlice, LooksUp, UnpacksNames]


@pytest.mark.parametrize("inputs", [(X,), None], ids=["given", "guessed"])
@pytest.mark.parametrize("also_in_training", [True, False], ids=["always", "in eval mode"])
@pytest.mark.parametrize("make", NONES)
def test_a_part_that_is_none_is_none(make: type[Unpacks], also_in_training: bool, inputs: Any) -> None:
    model = make(also_in_training)
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert train_model.meta[NOTES] == ()
    for training in (True, False):
        assert agrees(train_model.train(training), model.train(training), MORE)


class OfTwo(Indexes):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return super().forward(x + y)


def test_where_nothing_can_be_guessed_it_is_said_that_none_was_not_looked_for() -> None:
    with pytest.warns(
        UserWarning, match="^limitation: whether a part of what part returns is None could not be seen"
    ):
        fxcollab.transform(OfTwo(), "simple", ["b"], seed=0)
    train_model = proven(OfTwo(), (X, X))
    assert train_model.meta[NOTES] == ()


class ReadsANamedPart(Unpacks):
    kind = "named"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs.h, outputs.other


class ReadsAField(ReadsANamedPart):
    kind = "fields"


class GetsAnEntry(Unpacks):
    kind = "dict"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs["h"], outputs.get("other")


class GetsAMissingEntry(Unpacks):
    kind = "dict"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs["h"], outputs.get("missing")


class TakesTheWhole(Unpacks):
    kind = "none"

    def parts(self, x: Tensor) -> Any:
        return self.a(x), self.part(x)


def _pair_of(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return (x, None) if x.sum() > -1e9 else (x, x)  # can't be traced


class TakesAHelpersPart(Unpacks):
    def parts(self, x: Tensor) -> Any:
        outputs = _pair_of(self.a(x))
        return outputs[0], outputs[1]


_WHOLE = bug("only parts of a module's result are looked at: a None that is the whole looks like a value, silently")


@pytest.mark.parametrize(
    "make",
    [
        ReadsANamedPart,
        ReadsAField,
        GetsAnEntry,
        GetsAMissingEntry,
        pytest.param(TakesTheWhole, marks=_WHOLE),
        TakesAHelpersPart,
    ],
)
def test_none_is_none_however_it_is_read(make: type[Unpacks]) -> None:
    proven_or_refused(make())


# ------------------------------------------------------------------------------- 7. dicts that modules return


class Features(nn.Module):
    """Kept whole; returns several values."""

    def __init__(self, kind: type = OrderedDict) -> None:
        super().__init__()
        self.p, self.q, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> Any:
        p, q = self.p(x), self.q(x)
        return [p, q] if self.kind is list else self.kind(p=p, q=q)


class OfFeatures(Net):
    kind: type = OrderedDict

    def __init__(self) -> None:
        super().__init__()
        self.features = Features(self.kind)
        self.heads = nn.ModuleDict({"p": nn.Linear(8, 8), "q": nn.Linear(8, 8)})


class AddsAll(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        values = list(self.features(x).values())
        return self.tail(values[0] * 2 - values[-1])


class AddsAllItems(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        h: Any = 0
        for name, value in self.features(x).items():
            h = h + (value * 2 if name == "p" else value)
        return self.tail(h)


class CallsByKey(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return self.tail(sum(self.heads[name](features[name]) for name in features))


class CallsByKeys(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return self.tail(sum(self.heads[name](features[name]) for name in features.keys()))  # noqa: SIM118


class UnpacksByName(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        return self.tail(self.subtract(**self.features(x)))

    def subtract(self, p: Tensor, q: Tensor) -> Tensor:
        return p * 2 - q


class LooksForAKey(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        h = features["p"] if "p" in features and "z" not in features else features["q"]
        return self.tail(h * len(features))


@pytest.mark.parametrize("inputs", [(X,), None], ids=["given", "guessed"])
@pytest.mark.parametrize("make", [AddsAll, AddsAllItems, CallsByKey, CallsByKeys, UnpacksByName, LooksForAKey])
def test_a_dict_that_a_module_returns_is_read_as_one(make: type[Net], inputs: Any) -> None:
    model = make()
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert agrees(train_model, model, MORE)


class CallsByItems(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        return self.tail(sum(self.heads[name](value) for name, value in self.features(x).items()))


class ReturnsByItems(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        return {name: self.tail(value) for name, value in self.features(x).items()}


@pytest.mark.parametrize("make", [CallsByItems, ReturnsByItems])
def test_the_keys_of_items_are_texts(make: type[Net]) -> None:
    proven(make(), splits=["features"])


class Deletes(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        del features["q"]  # deletes
        return self.tail(features["p"])


def test_a_deletion_is_refused() -> None:
    assert line_at(refused(lambda: made(Deletes(), (X,))).where) == 'del features["q"]  # deletes'


# Each writes into a dict or list: of the trunk's in a branch, of a branch's own, of the trunk's in the trunk.


class SetsInABranch(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features["r"] = self.b(features["p"])
        return self.d(self.c(features["r"] + features["q"]))


class OverwritesInABranch(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        h = self.b(features["p"])
        features["p"] = self.c(h)
        return self.d(features["p"] + features["q"])


class OverwritesWhatIsReadAgain(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        before = features["q"]
        features["q"] = self.c(self.b(features["p"]))
        return self.d(features["q"] + before + sum(features.values()))


class SetsItsOwn(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(self.b(self.a(x)))
        features["r"] = self.c(features["p"])
        return self.d(features["r"] + features["q"])


class SetsInTheTrunk(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features["p"] = self.a(features["q"])
        h = self.b(features["p"])
        return self.d(self.c(h) + features["p"])


class SetsInTrunkAndBranch(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features["p"] = features["q"] * 2
        h = self.b(features["p"])
        features["q"] = self.c(h)
        return self.d(features["p"] - features["q"])


class SetsUnderTwoNames(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        box = {"inner": features}
        box["inner"]["p"] = self.b(features["p"])
        return self.d(self.c(features["p"] + features["q"]))


class SetsACopy(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        mine = dict(features)
        mine["p"] = self.b(features["p"])
        return self.d(self.c(mine["p"] + features["p"]))


class Updates(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features.update(q=self.c(self.b(features["p"])))
        return self.d(features["q"] + features["p"])


class Pops(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        h = self.b(features["p"])
        return self.d(self.c(h) + h * features.pop("q"))


class SetsAList(OfFeatures):
    kind = list

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features[1] = self.b(features[0])
        return self.d(self.c(features[0] + features[1]))


class Appends(OfFeatures):
    kind = list

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features.append(self.b(features[0]))
        return self.d(self.c(torch.stack(features).sum(0)))


class Extends(OfFeatures):
    kind = list

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features += [self.b(features[0])]
        return self.d(self.c(torch.stack(features).sum(0)))


class PopsTheLast(OfFeatures):
    kind = list

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        h = self.b(features[0])
        return self.d(self.c(h * features.pop()) + features[-1])


WRITERS = [
    SetsInABranch, OverwritesInABranch, SetsItsOwn, SetsInTheTrunk, SetsInTrunkAndBranch,
    SetsUnderTwoNames, SetsACopy, Updates, Pops, SetsAList, Appends, Extends, PopsTheLast,
]  # fmt: skip


@pytest.mark.parametrize("inputs", [(X,), None], ids=["given", "guessed"])
@pytest.mark.parametrize("make", WRITERS)
def test_what_a_branch_writes_into_a_container_no_other_reads(make: type[Net], inputs: Any) -> None:
    model = make()
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert agrees(train_model, model, MORE)


@pytest.mark.parametrize("inputs", [(X,), None], ids=["given", "guessed"])
def test_an_entry_read_before_it_is_overwritten_is_kept_or_refused(inputs: Any) -> None:
    model = OverwritesWhatIsReadAgain()
    try:
        train_model = made(model, inputs)
    except SplitError as error:
        assert error.why and error.hint
        assert "test_questions.py" in str(error.where)
    else:
        fxcollab.verify(model, train_model, (X,)).raise_if_failed()


class ReturnsTheDict(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features["out"] = self.d(self.c(self.b(features["p"])))
        return features


def test_each_head_returns_a_dict_of_its_own() -> None:
    first, second = proven(ReturnsTheDict())(X)
    assert list(first) == list(second) == ["p", "q", "out"]
    assert first is not second and not torch.equal(first["out"], second["out"])


class NestedFeatures(Features):
    def forward(self, x: Tensor) -> Any:
        return {"p": self.p(x), "more": [self.q(x)], "deep": {"q": self.q(x)}}


class OfNestedFeatures(Net):
    def __init__(self) -> None:
        super().__init__()
        self.features = NestedFeatures()


class SetsInside(OfNestedFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        h = self.b(features["p"])
        features["more"][0] = h
        return self.d(self.c(features["more"][0]) + h)


class SetsDeepInside(OfNestedFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        h = self.b(features["p"])
        features["deep"]["q"] = h
        return self.d(self.c(features["deep"]["q"]) + h)


class AppendsInside(OfNestedFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        h = self.b(features["p"])
        features["more"].append(h)
        return self.d(self.c(features["more"][-1]) + h)


class AddsInPlaceInside(OfNestedFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        h = self.b(features["p"])
        features["more"][0].add_(h)
        return self.d(self.c(features["more"][0]) + h)


class SetsInABox(OfNestedFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        box = [features["p"], features["more"]]
        h = self.b(box[0])
        box[1][0] = h
        return self.d(self.c(features["more"][0]) + h)


class WritesIntoAView(Net):
    """Nothing but tensors: a branch writes into a view of the trunk's, and the trunk's is read again."""

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        view = h[:, :4]
        y = self.b(h)
        view.copy_(y[:, :4])
        return self.d(self.c(h * 1) + y)


class WritesIntoAViewOfWhatCrosses(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        view = h[:, :4]
        y = self.b(x)
        view.copy_(y[:, :4])
        return self.d(self.c(h + y))


INSIDE = [
    SetsInside, SetsDeepInside, AppendsInside, AddsInPlaceInside, SetsInABox, WritesIntoAView,
    WritesIntoAViewOfWhatCrosses,
]  # fmt: skip


@pytest.mark.parametrize("make", INSIDE)
def test_a_write_into_a_part_is_seen_in_the_whole(make: type[Net]) -> None:
    proven_or_refused(make())


class OfABatch(Net):
    """Its input is a dict."""


class AddsToTheBatch(OfABatch):
    def forward(self, batch: Any) -> Any:
        batch["h"] = self.b(self.a(batch["x"]))
        return self.d(self.c(batch["h"]) + batch["x"])


class OverwritesTheBatch(OfABatch):
    def forward(self, batch: Any) -> Any:
        h = self.b(self.a(batch["x"]))
        batch["x"] = h
        return self.d(self.c(batch["x"]) + batch["y"])


class OverwritesTheBatchFirst(OfABatch):
    def forward(self, batch: Any) -> Any:
        batch["x"] = self.a(batch["x"])
        h = self.b(batch["x"])
        return self.d(self.c(h) + batch["x"])


class OverwritesTheBatchTwice(OfABatch):
    def forward(self, batch: Any) -> Any:
        batch["x"] = self.a(batch["x"])
        batch["x"] = self.b(batch["x"])
        batch["y"] = self.c(batch["x"])
        return self.d(batch["x"] + batch["y"])


@pytest.mark.parametrize(
    "make", [AddsToTheBatch, OverwritesTheBatch, OverwritesTheBatchFirst, OverwritesTheBatchTwice]
)
def test_what_is_written_into_an_input_stays_in_its_branch(make: type[Net]) -> None:
    model, batch = make(), {"x": X, "y": 2 * X}
    train_model = proven(model, (batch,))
    assert list(batch) == ["x", "y"] and batch["x"] is X
    assert agrees(train_model, model, {"x": MORE, "y": 3 * MORE})


# ------------------------------------------------------------------------------------------ 8. numpy's numbers


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda x: x * np.sqrt(8),
    "times from the left": lambda x: np.sqrt(8) * x,
    "minus from the left": lambda x: np.float64(1) - x,
    "single": lambda x: x / np.float32(0.3),
    "index": lambda x: x + x[:, np.int64(0)][:, None],
    "slice": lambda x: x + x[:, np.int64(0) : np.int64(1)],
    "list": lambda x: x + x[..., [np.int64(0)]],
    "view": lambda x: x.view(-1, np.int64(2), np.int32(4)).flatten(1),
    "view of a list": lambda x: x.reshape([-1, np.int64(2), np.int64(4)]).flatten(1),
    "keyword": lambda x: torch.clamp(x, min=np.float64(-0.5)),
    "comparison": lambda x: x * (x > np.float64(0.5)),
    "in place": lambda x: x.add_(np.float64(1.5)),
    "a constant": lambda x: x * torch.from_numpy(np.arange(8, dtype=np.float32)),
}


class Computes(Net):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.compute(self.a(x)))


@pytest.mark.parametrize("compute", NUMBERS)
def test_numpys_numbers_are_numbers(compute: str) -> None:
    model = Computes(NUMBERS[compute])
    train_model = proven(model)
    assert agrees(train_model, model, MORE)
    found: list[Any] = []
    for node in train_model.graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: found.append(type(leaf).__module__))
    assert "numpy" not in found and "np." not in train_model.code


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x / np.prod(x.shape),
        lambda x: x * np.sqrt(x.shape[-1]),
        lambda x: x / np.sqrt(x.size(1)),
        lambda x: np.float64(0.5) * x + np.array(x.shape).sum(),
        lambda x: x * np.maximum(x.shape[0], 3),
    ],
)
def test_what_numpy_computes_of_sizes_is_decided_for_the_example(compute: Callable[[Tensor], Tensor]) -> None:
    train_model = proven(Computes(compute))
    assert any("was decided for an example input" in note for note in train_model.meta[NOTES])


def test_what_numpy_computes_of_a_tensor_is_refused() -> None:
    class Uses(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x * np.linalg.norm(x))  # asks

    error = refused(lambda: made(Uses(), (X,)))
    assert "numpy computes with" in str(error.why)
    assert line_at(error.where).endswith("# asks")


# ------------------------------------------------------------------- 9. numpy's and Python's random numbers


class MasksTime(nn.Module):
    """Kept whole; masks a stretch that numpy chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            keep = torch.ones_like(x)
            for row in range(x.shape[0]):
                start = np.random.randint(0, 6)
                keep[row, start : start + random.randint(1, 3)] = 0
            x = x * keep * (torch.rand(1) + 0.5)
        return self.layer(x)


class ScalesAtRandom(MasksTime):
    """Draws without asking for a size, so that it can be traced."""

    def forward(self, x: Tensor) -> Any:
        return self.layer(x * np.random.rand() * random.random() if self.training else x)


class MasksInAPair(MasksTime):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Masked(Net):
    def __init__(self, mask: type[nn.Module] = MasksTime) -> None:
        super().__init__()
        self.mask = mask()

    def forward(self, x: Tensor) -> Any:
        return self.d(self.mask(self.b(self.a(x))))


class MaskedFirst(Masked):
    def forward(self, x: Tensor) -> Any:
        return self.tail(self.mask(x))


class MaskedAndAsked(Masked):
    def forward(self, x: Tensor) -> Any:
        h = self.mask(self.a(x))
        return self.tail(h if h.shape[-1] == 8 else x)


class MaskedInAPair(Masked):
    def __init__(self) -> None:
        super().__init__(MasksInAPair)

    def forward(self, x: Tensor) -> Any:
        outputs = self.mask(x)
        return self.tail(outputs[0] if outputs[1] is None else x)


class GeneratorStates:
    def __init__(self) -> None:
        self._states = _generator_states()

    def moved(self) -> list[str]:
        """The generators that were drawn from since."""
        now = _generator_states()
        return [name for name, state in self._states.items() if pickle.dumps(state) != pickle.dumps(now[name])]


def _generator_states() -> dict[str, Any]:
    return {"torch": torch.get_rng_state().tolist(), "python": random.getstate(), "numpy": np.random.get_state()}


def test_generator_states_tell_which_was_drawn_from() -> None:
    states = GeneratorStates()
    assert states.moved() == []
    np.random.rand()
    assert states.moved() == ["numpy"]
    random.random()
    torch.rand(1)
    assert states.moved() == ["torch", "python", "numpy"]


MASKED = [
    pytest.param(Masked, id="in the heads"),
    pytest.param(lambda: Masked(ScalesAtRandom), id="in the heads, traceable"),
    pytest.param(MaskedFirst, id="in the trunk"),
    pytest.param(MaskedAndAsked, id="asked about"),
    pytest.param(MaskedInAPair, id="in a pair"),
]


@pytest.mark.parametrize("make", MASKED)
def test_random_numbers_drawn_in_a_module_kept_whole_are_proved(make: Callable[[], nn.Module]) -> None:
    model = make()
    train_model = proven(model)
    assert not torch.equal(train_model(X)[0], train_model(X)[0])


@pytest.mark.parametrize("make", MASKED[:1] + MASKED[2:4])
def test_the_generators_stay_where_they_are(make: Callable[[], nn.Module]) -> None:
    model, states = make(), GeneratorStates()
    fxcollab.capture(model, ["b"], (X,))
    assert states.moved() == []
    train_model = made(model, (X,))
    assert states.moved() == []
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert states.moved() == []


@pytest.mark.parametrize("act", ["transform", "verify"])
def test_the_generators_stay_where_they_are_while_effects_are_looked_for(act: str) -> None:
    model = Masked(ScalesAtRandom)
    states = GeneratorStates()
    train_model = made(model, (X,))
    if act == "verify":
        states = GeneratorStates()
        fxcollab.verify(model, train_model, (X,))
    assert states.moved() == []


@pytest.mark.parametrize("act", ["capture", "transform", "verify"])
def test_the_generators_stay_where_they_are_while_none_is_looked_for(act: str) -> None:
    model = MaskedInAPair()
    states = GeneratorStates()
    if act == "capture":
        fxcollab.capture(model, ["b"], (X,))
    else:
        train_model = made(model, (X,))
    if act == "verify":
        states = GeneratorStates()
        fxcollab.verify(model, train_model, (X,))
    assert states.moved() == []


@pytest.mark.parametrize("act", ["capture", "verify"])
def test_the_generators_stay_where_they_are_while_inputs_are_guessed(act: str) -> None:
    model = MaskedAndAsked()
    states = GeneratorStates()
    if act == "capture":
        fxcollab.capture(model, ["b"])
    else:
        train_model = made(model)
        states = GeneratorStates()
        fxcollab.verify(model, train_model)
    assert states.moved() == []


def test_numbers_that_are_drawn_for_an_example_are_no_constants() -> None:
    assert not [note for note in made(MaskedAndAsked(), (X,)).meta[NOTES] if "random numbers" in note]


class DrawsAndAsks(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x * np.random.rand())
        return self.tail(h if x.sum() > 0 else -h)


def test_generators_stay_where_they_are_with_real_examples_and_after_a_refusal() -> None:
    model, without_data = DrawsAndAsks(), DrawsAndAsks().to("meta")
    states = GeneratorStates()
    assert any("random numbers" in note for note in fxcollab.capture(model, ["b"], (X,)).meta[NOTES])
    assert states.moved() == []
    refused(lambda: fxcollab.capture(without_data, ["b"], (X.to("meta"),)))
    assert states.moved() == []


# ----------------------------------------------------------------------------- 10. a split at a list of modules


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
        (Stack, "blocks", "blocks.2"),
        (lambda: Stack((2, 1, 0)), "blocks", "blocks.0"),
        (lambda: Stack((0, 1)), "blocks", "blocks.1"),
        (DictOfBlocks, "blocks", "blocks.two"),
        (Around, "stack.blocks", "stack.blocks.2"),
        pytest.param(
            lambda: Stack((0, 1, 2, 0)), "blocks", "blocks.0@2",
        ),
    ],
    ids=["all", "backwards", "some", "dict", "nested", "again"],
)  # fmt: skip
def test_a_split_at_a_list_of_modules_names_the_last_one_called(
    make: Callable[[], nn.Module], split: str, last: str
) -> None:
    model = make()
    with pytest.raises(SplitError, match=f"Module '{split}' returns no value of the captured graph") as caught:
        made(model, (X,), [split])
    assert caught.value.why == "the forward calls the modules in it, and never itself"
    assert caught.value.hint == f"split at the last of them: '{last}'"
    proven(model, splits=[last])


def test_a_split_at_a_list_of_modules_that_are_never_called_names_none_of_them() -> None:
    with pytest.raises(SplitError) as caught:
        made(Stack(()), (X,), ["blocks"])
    assert caught.value.why == "the forward never calls it"
    assert caught.value.hint == "split at a module that the forward calls: head"


# --------------------------------------------------------------------------------------- found on the way


def test_a_forward_that_was_replaced_on_the_root_is_the_one_captured() -> None:
    model = Net()
    model.forward = types.MethodType(lambda self, x: self.tail(self.a(x) * 2), model)  # type: ignore[method-assign]
    proven_or_refused(model)
