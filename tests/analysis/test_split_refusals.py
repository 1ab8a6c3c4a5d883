"""What is said where a cut isn't possible."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import SplitError
from tests.analysis.helpers import Chain, Parallel, Reuse


def state_of(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"random": torch.get_rng_state().tolist()}
    for path, module in model.named_modules():
        kept = {k: id(v) for k, v in module.__dict__.items() if k != "training"}
        found[path] = (kept, module.training, list(module._modules), type(module), module.forward.__func__)
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[f"tensor {name}"] = (id(tensor), tensor._version, tensor.requires_grad, tensor.tolist())
    return found


def refusal(model: nn.Module, splits: Sequence[str] | str, **options: Any) -> SplitError:
    """The error of a transform, after which the model is as it was."""
    next(iter(model.children())).eval()
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    with pytest.raises(SplitError) as caught:
        fxcollab.transform(model, splits=splits, **options)
    assert state_of(model) == before
    return caught.value


@pytest.mark.parametrize(
    ("split", "near"), [("layer3", "layer1"), ("layer1.9", "layer1"), ("Stem", "stem"), ("layr2", "layer2")]
)
def test_an_unknown_split_is_answered_with_close_names(split: str, near: str) -> None:
    error = refusal(Chain(), [split])
    assert error.what == f"There is no module and no node named {split!r}."
    assert error.where == "Chain"
    assert str(error.hint).startswith("did you mean ")
    assert near in str(error.hint)


def test_the_leaf_of_a_path_is_found_elsewhere() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.fc = Chain(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.backbone(x))

    assert "backbone.layer2" in str(refusal(Wrapped(), ["encoder.stages.layer2"]).hint)


def test_a_split_like_nothing_is_answered_with_what_there_is() -> None:
    error = refusal(Chain(), ["zzz"])
    assert str(error.hint).startswith("there are stem, layer1, layer2, fc; find_splits")


def test_one_unknown_part_of_a_joint_split_is_named() -> None:
    assert refusal(Chain(), ["layer1+layr2"]).what == "There is no module and no node named 'layr2'."


def test_a_split_off_the_path_to_the_output_is_refused() -> None:
    error = refusal(Parallel(), ["aside"])
    assert error.what == "Split 'aside' is not on the path to the output."
    assert error.why == "nothing of the output is computed from 'aside'"
    assert error.hint == "on the path are stem, layer1, layer2, fc"


def test_a_refusal_shows_the_line_of_the_callers_code() -> None:
    where = str(refusal(Parallel(), ["aside"]).where)
    assert where.startswith("node 'aside' (call_module aside), File ")
    assert str(sys.modules[Parallel.__module__].__file__) in where and where.endswith("in forward")


def test_splits_in_the_wrong_order_are_refused() -> None:
    error = refusal(Chain(), ["layer2", "layer1"])
    assert error.what == "Split 'layer2' lies behind 'layer1', which is named after it."
    assert error.why == "splits are given in the order of the data flow"
    assert error.hint == "name them in this order: layer1,layer2"
    hint = refusal(Chain(), ["layer2.0", "layer2.1", "layer1"]).hint
    assert hint == "name them in this order: layer1,layer2.0,layer2.1"


def test_parallel_splits_are_refused_with_the_joint_cut() -> None:
    error = refusal(Parallel(), ["layer1", "layer2"])
    assert error.what == "Split 'layer2' doesn't lie behind split 'layer1'."
    assert error.hint == "if both belong to one cut, name it 'layer1+layer2'"


def test_a_path_around_a_split_is_refused() -> None:
    class Around(Chain):
        def forward(self, x: Tensor) -> Tensor:
            a = self.stem(x)
            b = self.layer1(a)
            c = self.layer2(x)  # does not pass through stem
            return self.fc(b + self.fc.weight.sum() * c.sin()) + c

    error = refusal(Around(), ["stem", "layer2"])
    assert error.what == "Split 'layer2' doesn't lie behind split 'stem'."


@pytest.mark.parametrize("splits", [["layer1", "layer1@1"], ["layer1", "layer1.1"]])
def test_two_names_of_one_value_are_refused(splits: list[str]) -> None:
    error = refusal(Chain(), splits)
    assert error.what == f"Splits {splits[0]!r} and {splits[1]!r} are the same value."
    assert error.hint == "leave one out"


@pytest.mark.parametrize("split", ["layer1+layer1", "layer1+layer1@1"])
def test_a_joint_split_at_one_value_twice_is_refused(split: str) -> None:
    error = refusal(Chain(), [split])
    assert error.what == f"Split {split!r} names the same value twice."


def test_a_joint_split_at_values_behind_one_another_is_refused() -> None:
    error = refusal(Chain(), ["stem+layer2"])
    assert error.what == "Split 'stem+layer2' cuts at values that lie behind one another."
    assert error.why == "'layer2' depends on another value of the same split"


def test_a_split_without_parameters_behind_it_is_refused() -> None:
    error = refusal(Chain(), ["fc"])
    assert error.what == "Split 'fc' has no effect."
    assert "no parameter lies between it and the output" in str(error.why)
    assert error.hint == "move the split towards the input"


def test_a_split_without_parameters_before_the_next_is_refused() -> None:
    error = refusal(Chain(), ["layer1.0", "layer1.1"])
    assert error.what == "Split 'layer1.0' has no effect."
    assert "between it and layer1.1" in str(error.why)
    assert "give 'layer1.1' a larger fan-out" in str(error.hint)


class Tied(nn.Module):
    """Every parameter is used twice, some under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = self.again = nn.Parameter(torch.ones(4))
        self.one = self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.other(torch.relu(self.one(x * self.gain)) * self.again)
        return found


class TiedOutput(nn.Module):
    """As in language models: the output layer has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.relu(self.embed(x)))
        return found


@pytest.mark.parametrize(
    ("make", "split", "names"),
    [(Tied, "one", "gain"), (Tied, "other@1", "one.weight"), (TiedOutput, "embed", "out.weight")],
)
def test_a_split_behind_which_all_parameters_are_used_before_too_is_refused(
    make: Callable[[], nn.Module], split: str, names: str
) -> None:
    model = make()
    error = refusal(model, [split])
    assert error.what == f"Split {split!r} has no effect." and names in str(error.where)
    why = "what lies behind it has parameters that are used before it too, and so are shared by all heads"
    assert error.why == why
    assert "use multi-instance" in str(error.hint)
    train_model = fxcollab.transform(model, "multi-instance")
    fxcollab.verify(model, train_model, (torch.randn(2, 4),)).raise_if_failed()


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x @ self.table
        return found


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


@pytest.mark.parametrize("make", [nn.ReLU, nn.Dropout, Constant, Unused])
def test_instances_of_a_model_whose_output_depends_on_no_parameter_are_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(SplitError) as caught:
        fxcollab.transform(make(), "multi-instance", example_inputs=(torch.randn(2, 4),))
    assert caught.value.what == "Several instances have no effect."
    assert "no parameter lies between the inputs and the output" in str(caught.value.why)
    assert caught.value.hint == "give a model whose output depends on parameters"


@pytest.mark.parametrize(("split", "times"), [("mix@2", "mix is called once"), ("cell@4", "cell is called 3 times")])
def test_a_call_number_too_high_is_refused(split: str, times: str) -> None:
    error = refusal(Reuse(), [split])
    assert error.what == f"There is no call {split!r}."
    assert error.why == times


@pytest.mark.parametrize("split", ["cell@0", "cell@x", "cell@-1", "cell@1.5"])
def test_what_is_no_call_number_is_refused(split: str) -> None:
    error = refusal(Reuse(), [split])
    assert error.what == f"{split!r} names no call."
    assert error.hint == "cell@2 is the second call of cell"


def test_a_module_that_is_never_called_is_refused() -> None:
    error = refusal(Parallel(), ["never"])
    assert error.what == "Module 'never' returns no value of the captured graph."
    assert error.why == "the forward never calls it"
    assert "stem, aside, layer1, layer2" in str(error.hint)


class Whole(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def test_a_module_inside_one_kept_whole_is_refused_with_that_one() -> None:
    model = Chain()
    traced = fx.GraphModule(model, Whole().trace(model))
    error = refusal(traced, ["layer1.0"])
    assert error.what == "Module 'layer1.0' returns no value of the captured graph."
    assert error.why == "'layer1' is kept whole and contains it"
    assert error.hint == "split at 'layer1', or capture with granularity='op' (--granularity op)"


def test_an_exported_module_that_hands_several_values_on_is_refused_with_their_names() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.two(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.fc = Pair(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.pair(x)
            return self.fc(one * two)

    exported = torch.export.export(Outer(), (torch.randn(2, 4),)).module()
    before = copy.copy(exported.code)
    with pytest.raises(SplitError, match="Module 'pair' returns 2 values") as caught:
        fxcollab.transform(exported, splits=["pair"])
    assert caught.value.hint == "cut at several values at once: linear+linear_1"
    assert exported.code == before


def test_storage_written_behind_a_split_and_read_through_a_view_is_refused() -> None:
    class Torn(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            view = x.view(-1, 4)
            y = self.layer1(x)
            x.mul_(self.layer2(y))
            return self.fc(view * self.layer2(y))

    error = refusal(Torn(), ["layer1"])
    assert error.what == "'mul_' writes in place into storage that crosses the split twice."
    assert error.why == "'view' may share the storage of stem and is read after the write"
    assert "out-of-place" in str(error.hint)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pattern": "simple", "splits": ["layer1"], "heads": 1},
        {"pattern": "hierarchical", "splits": ["layer1"], "fanouts": (2, 2)},
        {"pattern": "hierarchy", "splits": ["layer1"]},
        {"splits": ["layer1"], "init": "copy"},
        {"splits": ["layer1"], "init": "zeros"},
        {"splits": ["layer1"], "peers": "stem"},
        {"splits": ["layer1"], "granularity": "all"},
        {"splits": ["layer1"], "factory": lambda: nn.Linear(2, 2)},
        {"splits": ["layer1"], "example_inputs": (1, 2, 3)},
    ],
)
def test_whatever_fails_leaves_the_model_as_it_was(arguments: dict[str, Any]) -> None:
    model = Chain()
    model.layer1.eval()
    before = state_of(model)
    with pytest.raises(fxcollab.FxCollabError):
        fxcollab.transform(model, **arguments)
    assert state_of(model) == before


class AddsInTraining(nn.Module):
    """Nodes of the same name are other values in the two modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = OnlyInTraining(), OnlyInTraining()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return self.last(x + 1)


class OnlyInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y + self.other(x) if self.training else y


def test_a_name_that_is_another_value_in_eval_mode_is_refused() -> None:
    with pytest.raises(SplitError, match="is one value in train mode and another in eval mode") as caught:
        fxcollab.transform(AddsInTraining(), splits=["add"], granularity="op")
    assert "in train mode 'first' computes it, in eval mode 'the root'" in str(caught.value.why)
    with pytest.raises(SplitError, match="exists in train mode only"):
        fxcollab.transform(AddsInTraining(), splits=["second.add"], granularity="op")


@pytest.mark.parametrize("split", ["first", "second", "first.one+first.other", "second.one"])
def test_what_a_module_returns_is_one_value_in_both_modes(split: str) -> None:
    model = AddsInTraining()
    if "other" in split:
        with pytest.raises(SplitError, match="exists in train mode only"):
            fxcollab.transform(model, splits=[split], granularity="op")
    else:
        train_model = fxcollab.transform(model, splits=[split], granularity="op", init="copy-anyway")
        fxcollab.verify(model, train_model).raise_if_failed()
