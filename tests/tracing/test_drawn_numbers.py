"""Random numbers of Python and numpy drawn in modules that are kept whole."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcollab
from tests.speeds import slow_but
from tests.tracing.question_helpers import NOTES, Net, X, line_at, made, proven, refused


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


@pytest.mark.parametrize("make", slow_but(["in the heads", "in a pair", "asked about"], MASKED))
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


@pytest.mark.parametrize("act", slow_but(["capture", "verify"], ["capture", "transform", "verify"]))
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


@pytest.mark.parametrize("act", slow_but(["capture"], ["capture", "verify"]))
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
        h = self.a(x * (torch.rand(()) + np.random.rand(1)[0] * self.training))
        return self.tail(h if x.sum() > 0 else -h)


def test_generators_stay_where_they_are_with_real_examples_and_after_a_refusal() -> None:
    model, without_data = DrawsAndAsks(), DrawsAndAsks().to("meta")
    states = GeneratorStates()
    refused(lambda: fxcollab.capture(model, ["b"], (X,)))
    assert states.moved() == []
    refused(lambda: fxcollab.capture(without_data, ["b"], (X.to("meta"),)))
    assert states.moved() == []


class DropsAtRandom(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x))
        return self.d(self.c(h * random.random()))


class DropsWithNumpy(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x))
        return self.d(self.c(h * float(np.random.rand())))


class DropsALayer(Net):
    def forward(self, x: Tensor) -> Any:
        for layer in (self.a, self.b, self.c):
            if self.training and random.random() < 0.5:
                continue
            x = x + layer(x)
        return self.d(x)


@pytest.mark.parametrize(
    "make", slow_but([DropsWithNumpy, DropsALayer], [DropsAtRandom, DropsWithNumpy, DropsALayer])
)
def test_an_opened_forward_that_draws_numbers_of_python_or_numpy_is_refused(make: type[Net]) -> None:
    random.seed(0)
    error = refused(lambda: fxcollab.capture(make(), ["b"], (X,)))
    assert "random numbers of Python or numpy" in str(error.why)
    assert __file__ in str(error.where)


class LayerDrop(Net):
    def layers(self) -> list[nn.Module]:
        return [self.a, self.b, self.c]

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers():
            if self.training and torch.rand(1).item() < 0.1:
                continue
            x = x + layer(x)
        return self.d(x)


class LayerDropByAMask(LayerDrop):
    def forward(self, x: Tensor) -> Any:
        drop = torch.zeros(3).uniform_(0, 1) < (0.1 if self.training else 0)
        for layer in [layer for layer, dropped in zip(self.layers(), drop, strict=True) if not dropped]:
            x = x + layer(x)
        return self.d(x)


class LayerDropInPlace(LayerDrop):
    def forward(self, x: Tensor) -> Any:
        drop = torch.zeros(3)
        drop.bernoulli_(0.1)
        return self.d(self.c(x if drop.tolist()[0] else self.b(self.a(x))))


class AsksADroppedValue(LayerDrop):
    def forward(self, x: Tensor) -> Any:
        h = nn.functional.dropout(self.a(x), 0.5, self.training)
        return self.tail(h if h.flatten()[0] != 0 else x)


class AsksWhatNoDrawChanges(LayerDrop):
    def forward(self, x: Tensor) -> Any:
        h = nn.functional.dropout(self.a(x), 0.5, self.training)
        return self.tail(x if h.isnan().any() else h)


def test_a_question_about_drawn_values_that_no_draw_changes_is_an_ordinary_one() -> None:
    train_model = made(AsksWhatNoDrawChanges(), (X,), ["c"])
    assert len(train_model(X)) == 2


@pytest.mark.parametrize(
    "make",
    slow_but([LayerDrop, AsksADroppedValue], [LayerDrop, LayerDropByAMask, LayerDropInPlace, AsksADroppedValue]),
)
def test_a_question_whose_answer_is_drawn_is_refused(make: type[Net]) -> None:
    error = refused(lambda: made(make(), (X,), ["c"]))
    assert "random numbers that the forward draws" in str(error.why)
    assert line_at(error.where, __name__)


def _drops(x: Tensor, layer: Tensor) -> Tensor:
    if torch.rand(1).item() < 0.5 or random.random() < 0.1:
        return x
    return x + layer


class DropsInAFunction(Net):
    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(_drops(x, self.b(self.a(x)))))


def test_a_function_that_drops_at_random_draws_at_every_call() -> None:
    model = DropsInAFunction()
    train_model = made(model, (X,))
    for seed in range(4):
        results = []
        for module in (model, lambda x: train_model(x)[0]):
            torch.manual_seed(seed)
            random.seed(seed)
            results.append(module(X))
        assert torch.equal(*results)


class Whole(Net):
    """The way out: the loop in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = LayerDrop()

    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(nn.functional.pad(self.loop(x), (0, 4))))


def test_the_split_around_a_loop_that_drops_layers_is_named_and_works() -> None:
    error = refused(lambda: made(Whole(), (X,), ["loop.b"]))
    assert "'loop'" in str(error.hint)
    torch.manual_seed(0)
    proven(Whole(), splits=["loop"])


class AsksShapesOfDrawnValues(Net):
    """Real examples are needed for the first question; the others are no matter of what was drawn."""

    def forward(self, x: Tensor) -> Any:
        h = nn.functional.dropout(self.a(x), 0.5, self.training) if x.sum() > 0 else x
        noise = torch.rand(h.shape)
        if len(noise) > 0 and noise.shape[-1] == 8 and noise.dim() == 2 and h.is_floating_point() and h.numel():
            h = h + noise
        return self.tail(h)


def test_the_shape_of_a_drawn_value_is_not_drawn() -> None:
    made(AsksShapesOfDrawnValues(), (X,))
