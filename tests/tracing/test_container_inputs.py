"""Lists and dicts as inputs of an opened forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxcollab
from tests.speeds import slow_but
from tests.tracing.question_helpers import (
    MORE,
    NOTES,
    Net,
    X,
    agrees,
    line_at,
    made,
    proven,
    proven_or_refused,
    refused,
)


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
    assert any("inputs for which it differs raise an error" in note for note in train_model.meta[NOTES])
    assert agrees(train_model, model, [MORE, 3 * MORE])
    for number in (1, 3):
        error = refused(lambda number=number: train_model([X] * number))
        assert f"len(...) is 2; here it is {number}" in error.what
        assert line_at(error.where, __name__)


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


@pytest.mark.parametrize("positive", slow_but([True], [True, False]))
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
