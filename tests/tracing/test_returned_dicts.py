"""Dicts and lists that modules return, read and written by an opened forward."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import SplitError
from tests.speeds import slow_but
from tests.tracing.question_helpers import (
    GIVEN_OR_GUESSED,
    MORE,
    Net,
    X,
    agrees,
    line_at,
    made,
    proven,
    proven_or_refused,
    refused,
)


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


@pytest.mark.parametrize("inputs", GIVEN_OR_GUESSED)
@pytest.mark.parametrize(
    "make",
    slow_but(
        [AddsAll, CallsByKey, LooksForAKey],
        [AddsAll, AddsAllItems, CallsByKey, CallsByKeys, UnpacksByName, LooksForAKey],
    ),
)
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


@pytest.mark.parametrize("make", slow_but([CallsByItems], [CallsByItems, ReturnsByItems]))
def test_the_keys_of_items_are_texts(make: type[Net]) -> None:
    proven(make(), splits=["features"])


class Deletes(OfFeatures):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        del features["q"]  # deletes
        return self.tail(features["p"])


def test_a_deletion_is_refused() -> None:
    assert line_at(refused(lambda: made(Deletes(), (X,))).where, __name__) == 'del features["q"]  # deletes'


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


@pytest.mark.parametrize("inputs", GIVEN_OR_GUESSED)
@pytest.mark.parametrize(
    "make", slow_but([SetsInABranch, SetsInTheTrunk, SetsUnderTwoNames, SetsACopy, Pops, Appends], WRITERS)
)
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
        assert "test_returned_dicts.py" in str(error.where)
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


@pytest.mark.parametrize(
    "make", slow_but([SetsDeepInside, AppendsInside, AddsInPlaceInside, WritesIntoAViewOfWhatCrosses], INSIDE)
)
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
    "make",
    slow_but(
        [AddsToTheBatch, OverwritesTheBatchFirst],
        [AddsToTheBatch, OverwritesTheBatch, OverwritesTheBatchFirst, OverwritesTheBatchTwice],
    ),
)
def test_what_is_written_into_an_input_stays_in_its_branch(make: type[Net]) -> None:
    model, batch = make(), {"x": X, "y": 2 * X}
    train_model = proven(model, (batch,))
    assert list(batch) == ["x", "y"] and batch["x"] is X
    assert agrees(train_model, model, {"x": MORE, "y": 3 * MORE})
