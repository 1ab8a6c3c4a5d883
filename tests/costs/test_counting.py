"""Costs are counted exactly, inputs are guessed, and the summary says what is given up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.contents import tensors_in
from fxcollab.costs.costs import parameter_count
from fxcollab.costs.profile import profile
from fxcollab.costs.summary import Level, Summary, summarise
from fxcollab.errors import CaptureError, StateError
from fxcollab.tracing.examples import USUAL_IMAGES, accepts, example_tensors, guess_inputs
from fxcollab.tracing.examples import forward_flops as flops_of_modules
from fxcollab.tracing.interface import InputSpec, Interface
from tests.costs.helpers import (
    FC,
    LAYER1,
    LAYER2,
    STEM,
    Cifar,
    ModeDependent,
    Patches,
    Two,
    ValueDependent,
    Words,
    conv_flops,
    forward_flops,
    step_flops,
)

# Counting.


def test_flops_are_counted_by_hand() -> None:
    specs = Interface((InputSpec("x", (2, 3, 32, 32), "float32"),))
    expected = conv_flops(2, 3, 4, 32) + conv_flops(2, 4, 8, 16) + conv_flops(2, 8, 8, 16) + 2 * 2 * 8 * 10
    assert forward_flops(Cifar(), specs) == expected


def test_a_step_is_counted_by_hand() -> None:
    specs = Interface((InputSpec("x", (2, 3, 32, 32), "float32"),))
    nodes = profile(fxcollab.capture(Cifar()), specs).nodes.values()
    head = 3 * 2 * 2 * 8 * 10
    assert sum(cost.flops for cost in nodes) == step_flops(2, (3, 4, 32), (4, 8, 16), (8, 8, 16)) + head


@dataclass
class Held:
    """A structure whose fields torch's pytree doesn't know."""

    value: Any


class Bare:
    def __init__(self, value: Any) -> None:
        self.entries = [value]


class Holding(nn.Module):
    def __init__(self, last: nn.Module, hold: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.last, self.hold = last, hold

    def forward(self, x: Tensor) -> Any:
        return self.hold(self.last(x))


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Held,
    "object": Bare,
    "in one another": lambda y: {"out": (Held(Bare(y)), None)},
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
@pytest.mark.parametrize("inside", [False, True], ids=["output", "between modules"])
def test_a_step_costs_the_same_whatever_holds_its_values(hold: Callable[[Tensor], Any], inside: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
            self.held = Holding(nn.Linear(8, 8), hold)
            self.last = Reading()

        def forward(self, x: Tensor) -> Any:
            y = self.held(self.second(self.first(x)))
            return self.last(y) if inside else y

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, held: Any) -> Tensor:
            *_, y = tensors_in(held)
            return self.linear(y)

    plain = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8))
    if inside:
        plain.append(nn.Linear(8, 4))
    inputs = (torch.randn(4, 8),)
    model = Net() if inside else nn.Sequential(*list(Net().children())[:3])
    splits = ["second"] if inside else ["1"]
    found = fxcollab.training_costs(model, "simple", splits, heads=3, example_inputs=inputs)
    assert found == fxcollab.training_costs(plain, "simple", ["1"], heads=3, example_inputs=inputs)
    assert found.original.activations > 0


def test_flops_of_modules_are_counted_at_every_call() -> None:
    block = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    model = nn.Sequential(block, nn.Linear(4, 2), nn.Linear(2, 4), block)
    found = flops_of_modules(model, Interface((InputSpec("input", (3, 4), "float32"),)))
    once, around = 2 * 3 * 4 * 4, 2 * 3 * 4 * 2
    assert {name: flops for name, flops in found.items() if flops} == {
        "": 2 * (once + around), "0": 2 * once, "0.0": 2 * once, "1": around, "2": around,
    }  # fmt: skip


def test_counting_leaves_the_model_as_it_is() -> None:
    model = Cifar()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    forward_flops(model, Interface((InputSpec("x", (2, 3, 32, 32), "float32"),)))
    guess_inputs(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.slow
def test_a_model_without_values_is_counted_too() -> None:
    specs = Interface((InputSpec("x", (2, 3, 32, 32), "float32"),))
    with torch.device("meta"):
        model = Cifar()
    assert forward_flops(model, specs) == forward_flops(Cifar(), specs)
    assert guess_inputs(model) == guess_inputs(Cifar())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    assert parameter_count(model) == 16 + 16 + 4
    model[1].weight = model[0].weight
    assert parameter_count(model) == 16 + 4


# Guessing.


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Cifar, InputSpec("x", (2, 3, 64, 64), "float32")),
        pytest.param(lambda: Cifar().double(), InputSpec("x", (2, 3, 64, 64), "float64"), marks=pytest.mark.slow),
        (Patches, InputSpec("x", (2, 3, 224, 224), "float32")),
        pytest.param(lambda: Patches(384), InputSpec("x", (2, 3, 384, 384), "float32"), marks=pytest.mark.slow),
        (lambda: nn.Conv2d(1, 2, 5), InputSpec("input", (2, 1, 64, 64), "float32")),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3)),
            InputSpec("input", (2, 1, 28, 28), "float32"),
        ),
        (lambda: nn.Conv1d(2, 3, 200), InputSpec("input", (2, 2, 1024), "float32")),
        (lambda: nn.Conv3d(1, 2, 3), InputSpec("input", (2, 1, 8, 64, 64), "float32")),
        (lambda: nn.Sequential(nn.Linear(7, 3), nn.ReLU()), InputSpec("input", (2, 7), "float32")),
        (
            lambda: nn.Sequential(nn.Linear(7, 4), nn.Conv1d(16, 2, 3)),
            InputSpec("input", (2, 16, 7), "float32"),
        ),
        (Words, InputSpec("tokens", (2, 16), "int64")),
    ],
    ids=(
        "cifar", "double", "vit", "vit-384", "grey", "mnist", "conv1d", "conv3d", "linear", "sequence", "tokens"
    ),
)  # fmt: skip
def test_inputs_are_guessed_from_the_first_layer(make: Callable[[], nn.Module], expected: InputSpec) -> None:
    model = make()
    assert guess_inputs(model) == Interface((expected,))
    model(*example_tensors(model, Interface((expected,))))


def test_the_order_of_image_sizes_may_be_given() -> None:
    [spec] = guess_inputs(Cifar(), USUAL_IMAGES).inputs
    assert spec.shape == (2, 3, 224, 224)


@pytest.mark.slow
def test_a_recurrent_model_is_guessed() -> None:
    [spec] = guess_inputs(nn.GRU(5, 3, batch_first=True)).inputs
    assert spec == InputSpec("input", (2, 16, 5), "float32")


def test_only_inputs_without_a_default_count() -> None:
    with pytest.raises(CaptureError) as caught:
        guess_inputs(Two())
    assert caught.value.what == "No input that Two accepts could be guessed."
    assert caught.value.why == "its inputs are x, y"
    assert "example_inputs=" in str(caught.value.hint) and "--input 1x3x224x224" in str(caught.value.hint)


def test_a_model_that_no_usual_shape_fits_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        guess_inputs(Patches(672))
    assert caught.value.why == "none of the usual shapes fits"


def test_an_input_must_fit_in_both_modes() -> None:
    class Picky(Cifar):
        def forward(self, x: Tensor) -> Tensor:
            assert self.training or x.shape[-1] == 32
            return super().forward(x)

    [spec] = guess_inputs(Picky()).inputs
    assert spec.shape == (2, 3, 32, 32)
    assert accepts(Picky(), Interface((spec,)))
    assert not accepts(Picky(), Interface((InputSpec("x", (2, 3, 64, 64), "float32"),)))


def test_guesses_that_fail_are_not_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    guess_inputs(Patches(384))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_guessing_restores_what_a_forward_changes() -> None:
    class Counting(Cifar):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counting()
    guess_inputs(model)
    assert model.calls == 0 and "calls" not in vars(model)


# The summary.


def test_the_summary_of_a_small_net_by_hand() -> None:
    train_model = fxcollab.transform(
        Cifar(), splits="stem,layer1", example_inputs=(torch.zeros(2, 3, 32, 32),), seed=3
    )
    stem, layer1 = 2 * conv_flops(2, 3, 4, 32), 3 * conv_flops(2, 4, 8, 16)
    rest = 3 * (conv_flops(2, 8, 8, 16) + 2 * 2 * 8 * 10)
    summary = summarise(train_model)
    assert summary.costs is not None
    assert summary.costs.original.flops == stem + layer1 + rest
    assert summary.costs.training.flops == stem + 2 * layer1 + 4 * rest
    assert summary.costs.training.parameters == summary.parameters[1]
    assert replace(summary, costs=None) == Summary(
        pattern="hierarchical",
        heads=4,
        seed=3,
        init="fresh",
        start="only head 0 has the given weights behind the splits, the others start anew",
        chosen=None,
        levels=(
            Level(0, None, 1, ("x", "stem"), STEM),
            Level(1, "stem", 2, ("layer1",), LAYER1),
            Level(2, "layer1", 4, ("layer2", "mean", "fc"), LAYER2 + FC),
        ),
        shared=2,
        cloned=1 + 3 * 3,
        rescaled=1 + 2,
        copied=0,
        parameters=(STEM + LAYER1 + LAYER2 + FC, STEM + 2 * LAYER1 + 4 * (LAYER2 + FC)),
        costs=None,
        inputs="2x3x32x32",
        guessed=False,
        costs_unknown=None,
        limitations=(),
        recompute=None,
    )


def flops_in(summary: Summary) -> tuple[int, int] | None:
    costs = summary.costs
    return costs and (costs.original.flops, costs.training.flops)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"pattern": "multi-instance", "heads": 3}, marks=pytest.mark.slow),
        pytest.param({"pattern": "simple", "splits": "layer1", "heads": 3}, marks=pytest.mark.slow),
        {"pattern": "hierarchical", "splits": "stem,layer1", "fanouts": (2, 3)},
    ],
    ids=lambda options: options["pattern"],
)
def test_level_parameters_add_up_to_all_parameters(options: dict[str, Any]) -> None:
    summary = summarise(fxcollab.transform(Cifar(), **options))
    assert sum(level.branches * level.parameters for level in summary.levels) == summary.parameters[1]
    assert sum(level.parameters for level in summary.levels) == summary.parameters[0]


@pytest.mark.slow
def test_without_rescale_none_is_counted() -> None:
    assert summarise(fxcollab.transform(Cifar(), splits="stem", rescale=False)).rescaled == 0


@pytest.mark.slow
def test_a_copy_before_an_in_place_write_is_counted() -> None:
    class InPlace(Cifar):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer2(self.layer1(self.stem(x).relu_())).mean((2, 3)))

    copied = summarise(fxcollab.transform(InPlace(), splits="stem")).copied
    train_model = fxcollab.transform(InPlace(), splits="stem")
    assert copied == train_model.code.count("private_copy(")


@pytest.mark.slow
def test_a_guessed_input_is_said_to_be_one() -> None:
    summary = summarise(fxcollab.transform(Cifar(), splits="layer1"))
    assert summary.inputs == "2x3x224x224" and summary.guessed and summary.costs
    summary = summarise(fxcollab.transform(Words(), splits="embed"))
    assert summary.inputs == "2x16:int64" and summary.guessed and summary.costs


def test_costs_that_cannot_be_counted_say_why_and_stop_nothing() -> None:
    several = summarise(fxcollab.transform(Two(), splits="a"))
    assert (several.costs, several.inputs) == (None, None)
    assert several.costs_unknown == "its inputs are x, y"
    example = (torch.zeros(2, 3),)
    values = summarise(fxcollab.transform(ValueDependent(), splits="a", example_inputs=example))
    assert values.costs is None and "a training step on this input fails" in str(values.costs_unknown)
    assert "\n" not in str(values.costs_unknown)


class Recurrent(nn.Module):
    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__()
        self.layer, self.head = make(6, 5, batch_first=True, **options), nn.Linear(5 * (1 + len(options) // 2), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0].mean(1))


@pytest.mark.parametrize(("make", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers_are_counted_by_whatever_kernel_they_run(make: Any, gates: int, options: Any) -> None:
    model, steps, ways = Recurrent(make, **options), 3 * 7, 2 if options else 1
    costs = fxcollab.training_costs(model, "multi-instance", example_inputs=(torch.zeros(3, 7, 6),))
    rows = gates * 5 * ways
    forward = 2 * steps * rows * (6 + 5) + (2 * steps * rows * (5 * ways + 5) if options else 0)
    head = 2 * 3 * 5 * ways * 2
    without_input = 2 * steps * rows * 6  # which needs no gradient, but which some kernels compute
    assert 3 * forward - without_input - 2 * 3 * rows * 5 * 2 <= costs.original.flops - 3 * head <= 3 * forward


def test_an_input_that_was_given_is_counted_on_with_several_inputs() -> None:
    example = (torch.zeros(5, 3), torch.zeros(5, 4))
    summary = summarise(fxcollab.transform(Two(), splits="a", example_inputs=example))
    assert summary.inputs == "5x3, 5x4" and not summary.guessed
    assert flops_in(summary) == (2 * 5 * (2 * 3 * 4 + 3 * 4 * 2), 2 * 5 * (2 * 3 * 4 + 2 * 3 * 4 * 2))


def test_what_capturing_gave_up_is_in_the_summary() -> None:
    example = (torch.zeros(5, 3), torch.zeros(5, 4))
    [sentence] = summarise(fxcollab.transform(Two(), splits="a", example_inputs=example)).limitations
    assert "scale" in sentence


def test_the_summary_counts_in_train_mode_and_leaves_the_mode() -> None:
    train_model = fxcollab.transform(ModeDependent(), splits="a", example_inputs=(torch.zeros(5, 3),)).eval()
    summary = summarise(train_model)
    assert flops_in(summary) == (2 * 5 * (2 * 12 + 3 * 16), 2 * 5 * (2 * 12 + 2 * 3 * 16))
    assert not any(module.training for module in train_model.modules())


def test_only_a_training_model_has_a_summary() -> None:
    with pytest.raises(StateError, match="is not a training model"):
        summarise(Cifar())  # type: ignore[arg-type]
