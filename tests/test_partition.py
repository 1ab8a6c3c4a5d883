"""Partition: split names, levels, and what is said when a cut isn't possible."""

from __future__ import annotations

import copy
import types
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import SplitError
from fxcollab.tree import head_tree
from tests.untouched import Untouched


class Chain(nn.Module):
    """x -> stem -> layer1 -> layer2 -> fc, all of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layer1 = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))))


class Parallel(Chain):
    """Two paths beside each other, and what is off the path to the output or never called."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.aside(x)
        return self.fc(self.layer1(x) * self.layer2(x))


class Reuse(nn.Module):
    """One module called three times; an alias of another."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.mix, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.alias = self.mix

    def forward(self, x: Tensor) -> Tensor:
        x = self.cell(x)
        x = self.mix(x).relu()
        x = self.cell(x).sin()
        return self.fc(self.cell(x))


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.shift = nn.Parameter(torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        a = self.a(x) * self.scale
        b = self.b(a)
        c = self.c(b + x) + a
        weight = self.shift.sigmoid()
        return self.d(c * weight) + b


def cut(model: nn.Module, splits: Sequence[str], granularity: Any = "auto") -> tuple[fxcollab.CollabGraphModule, Any]:
    captured = fxcollab.capture(model, splits, granularity=granularity)
    return captured, fxcollab.partition(captured, head_tree("hierarchical", splits))


def levels(model: nn.Module, *splits: str, granularity: Any = "auto") -> dict[str, int]:
    captured, found = cut(model, splits, granularity)
    return {node.name: level for node, level in found.nodes[captured.graph].items()}


# -------------------------------------------------------------------------------------------------- levels


def test_levels_of_a_chain() -> None:
    assert levels(Chain(), "layer1") == {
        "x": 0, "stem": 0, "layer1": 0, "layer2": 1, "fc": 1, "output": 1,
    }  # fmt: skip
    assert levels(Chain(), "stem", "layer1") == {
        "x": 0, "stem": 0, "layer1": 1, "layer2": 2, "fc": 2, "output": 2,
    }  # fmt: skip


def test_levels_with_skips_and_parameters() -> None:
    assert levels(Skips(), "a", "b") == {
        "x": 0, "count": 0, "add_": 0, "a": 0, "scale": 1, "mul": 1, "b": 1, "add": 2, "c": 2, "add_1": 2,
        "shift": 2, "sigmoid": 2, "mul_1": 2, "d": 2, "add_2": 2, "output": 2,
    }  # fmt: skip


def test_levels_of_independent_instances() -> None:
    captured = fxcollab.capture(Skips())
    found = fxcollab.partition(captured, head_tree("multi-instance"))
    assert {n.name for n, level in found.nodes[captured.graph].items() if level == 0} == {"x"}
    assert set(found.state.values()) == {1}


def test_levels_of_modules_and_state_are_the_least_of_their_uses() -> None:
    _, found = cut(Reuse(), ["mix"])
    assert found.modules == {"cell": 0, "mix": 0, "alias": 0, "fc": 1}
    assert {name: level for name, level in found.state.items() if name.endswith("weight")} == {
        "cell.weight": 0, "mix.weight": 0, "alias.weight": 0, "fc.weight": 1,
    }  # fmt: skip


def test_unused_state_stays_in_the_trunk() -> None:
    _, found = cut(Parallel(), ["stem"])
    assert found.state["never.weight"] == 0
    assert "never" not in found.modules


def test_what_depends_on_no_input_is_drawn_to_its_users() -> None:
    found = levels(Skips(), "b")
    assert (found["scale"], found["shift"], found["sigmoid"]) == (0, 1, 1)


def test_a_read_after_an_inplace_write_depends_on_the_write() -> None:
    class Writes(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.layer1(x)
            x.add_(self.layer2(y))
            return self.fc(x.sin())

    found = levels(Writes(), "layer1")
    assert (found["stem"], found["layer2"], found["add_"], found["sin"]) == (0, 1, 1, 1)


# --------------------------------------------------------------------------------------------------- names


def levels_behind(model: nn.Module, split: str, granularity: Any = "auto") -> set[str]:
    return {name for name, level in levels(model, split, granularity=granularity).items() if level == 1}


def test_a_module_path_cuts_behind_the_modules_value() -> None:
    assert levels_behind(Chain(), "layer1") == {"layer2", "fc", "output"}


def test_a_path_inside_opens_and_cuts_there() -> None:
    assert levels_behind(Chain(), "layer1.0") == {"layer1_1", "layer2", "fc", "output"}


def test_a_call_number_cuts_behind_that_call() -> None:
    assert levels_behind(Reuse(), "cell@1") == levels_behind(Reuse(), "cell")
    assert levels_behind(Reuse(), "cell@2") == {"sin", "cell_2", "fc", "output"}
    assert levels_behind(Reuse(), "cell@3") == {"fc", "output"}


def test_a_node_name_cuts_behind_the_node() -> None:
    assert levels_behind(Reuse(), "relu") == {"cell_1", "sin", "cell_2", "fc", "output"}
    assert levels_behind(Reuse(), "cell_1") == levels_behind(Reuse(), "cell@2")


def test_an_alias_is_the_module_itself() -> None:
    assert levels_behind(Reuse(), "alias") == levels_behind(Reuse(), "mix")


def test_a_plus_b_is_one_cut_at_two_values() -> None:
    found = levels(Parallel(), "layer1 + layer2")
    assert {name for name, level in found.items() if level == 1} == {"mul", "fc", "output"}
    assert max(found.values()) == 1


@pytest.mark.parametrize("nested", ["inner", "inner.alias"])
def test_an_opened_modules_path_means_the_value_it_returns(nested: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = Reuse(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(x))

    expected = {"inner": {"fc", "output"}, "inner.alias": set()}[nested]
    found = levels_behind(Outer(), nested, granularity="op")
    assert found == expected or nested == "inner.alias"
    if nested == "inner.alias":
        assert found == levels_behind(Outer(), "inner.mix", granularity="op")


def test_a_module_called_twice_is_numbered_when_opened_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fc = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(self.block(x).sin()))

    kept, opened = levels_behind(Twice(), "block@2"), levels_behind(Twice(), "block@2", granularity="op")
    assert kept == opened == {"fc", "output"}
    assert len(levels_behind(Twice(), "block.0@2")) == 3
    assert levels_behind(fx.symbolic_trace(Twice()), "block@2") == {"fc", "output"}


def test_splits_may_be_one_text() -> None:
    one = fxcollab.transform(Chain(), splits="stem, layer1", seed=0)
    assert one.code == fxcollab.transform(Chain(), splits=["stem", "layer1"], seed=0).code


# ------------------------------------------------------------------------------------------------ messages


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
    assert error.hint == "the values at hand are x, stem, layer1, layer2, fc" or error.hint == (
        "the values at hand are stem, layer1, layer2, fc"
    )


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
    assert __file__ in where and where.endswith("in forward")


def test_splits_in_the_wrong_order_are_refused() -> None:
    error = refusal(Chain(), ["layer2", "layer1"])
    assert error.what == "Split 'layer2' lies behind 'layer1', which is named after it."
    assert error.why == "splits are given in the order of the data flow"
    assert error.hint == "turn the order round"


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
    with pytest.raises(SplitError, match="Module 'pair' hands 2 values on") as caught:
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


# ---------------------------------------------------------------------------- state that isn't registered


class Holder(nn.Module):
    """Kept whole; its forward may use what it holds, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


class Holding(nn.Module):
    """``holder`` holds what it is given; ``spare`` is never used, and ``pair`` is opened where it holds a split."""

    def __init__(self, hold: Callable[[Any], Any] = lambda model: None) -> None:
        super().__init__()
        self.a, self.holder = nn.Linear(4, 4), Holder()
        self.pair, self.spare = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.holder.__dict__["held"] = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.holder(self.a(x * self.table)))


class Slot:
    def __init__(self, value: Any) -> None:
        self.value = value

    def call(self, x: Tensor) -> Tensor:
        return self.value(x)


def default_of(weight: Tensor) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor = weight) -> Tensor:
        return F.linear(x, weight)

    return function


def only_by_keyword(weight: Tensor) -> Callable[..., Tensor]:
    def function(x: Tensor, *, weight: Tensor = weight) -> Tensor:
        return F.linear(x, weight)

    return function


def unregistered(model: nn.Module, *splits: str) -> SplitError:
    """The refusal, after which the model is as it was."""
    before = Untouched(model)
    with pytest.raises(SplitError, match="without registering it") as caught:
        fxcollab.transform(model, splits=splits, init="copy-anyway")
    assert before.differences() == []
    return caught.value


@pytest.mark.parametrize(
    ("hold", "where"),
    [
        (lambda model: model.a.weight, ""),
        (lambda model: (model.a.weight,), "[0]"),
        (lambda model: [1, [model.a.weight]], "[1][0]"),
        (lambda model: {"key": model.a.weight}, "['key']"),
        (lambda model: {model.a.weight: 1}, " (key 0)"),
        (lambda model: {model.a.weight}, "[0]"),
        (lambda model: deque([model.a.weight]), "[0]"),
        (lambda model: Slot([model.a.weight]), ".value[0]"),
        (lambda model: partial(F.linear, weight=model.a.weight), ".keywords['weight']"),
        (lambda model: partial(F.linear, model.a.weight), ".args[0]"),
        (lambda model: (lambda weight: lambda x: F.linear(x, weight))(model.a.weight), " (variable weight)"),
        (lambda model: default_of(model.a.weight), ".__defaults__[0]"),
        (lambda model: only_by_keyword(model.a.weight), ".__kwdefaults__['weight']"),
        (lambda model: model.a.weight.add, ".__self__"),
        (lambda model: weakref.ref(model.a.weight), "()"),
        (lambda model: nn.ParameterList([model.a.weight]), ""),
    ],
)  # fmt: skip
def test_a_parameter_of_the_trunk_that_a_head_reaches_unregistered_is_refused(hold: Any, where: str) -> None:
    error = unregistered(Holding(hold), "a")
    assert error.what == "'holder' reaches 'a.weight' without registering it."
    assert error.where == f"holder.held{where}"
    assert error.why == "the branches would share 'a.weight', and its gradient could not be rescaled to their mean"
    assert "on 'holder' itself, as in self.w = w" in str(error.hint)
    assert "or put the splits behind both" in str(error.hint)


@pytest.mark.parametrize(
    ("hold", "where"),
    [
        (lambda model: model.a, ""),
        (lambda model: [model.a], "[0]"),
        (lambda model: partial(model.a), ".func"),
        (lambda model: model.a.forward, ".__self__"),
        (lambda model: Slot(model.a).call, ".__self__.value"),
        (lambda model: (lambda a: lambda x: a(x))(model.a), " (variable a)"),
        (lambda model: weakref.ref(model.a), "()"),
    ],
)
def test_a_module_of_the_trunk_that_a_head_reaches_unregistered_is_refused(hold: Any, where: str) -> None:
    error = unregistered(Holding(hold), "a")
    assert error.what == "'holder' reaches 'a' without registering it."
    assert error.where == f"holder.held{where}"
    assert "share 'a.weight'" in str(error.why)


def test_what_a_module_inside_a_kept_one_holds_is_named_by_its_path() -> None:
    model = Holding()
    model.holder.inner.held = [model.a.bias]
    error = unregistered(model, "a")
    assert error.what == "'holder.inner' reaches 'a.bias' without registering it."
    assert error.where == "holder.inner.held[0]"


def test_frozen_parameters_count_they_may_be_thawed() -> None:
    model = Holding(lambda model: (model.a.weight,))
    model.a.requires_grad_(False)
    unregistered(model, "a")


def test_registered_state_that_only_a_head_reaches_is_refused_where_it_doesnt_register_it() -> None:
    assert "'spare.weight'" in str(unregistered(Holding(lambda model: [model.spare]), "a").why)


@pytest.mark.parametrize("split", ["a", "pair.0"])
def test_a_reference_to_the_model_around_is_refused(split: str) -> None:
    error = unregistered(Holding(lambda model: [model]), split)
    assert error.what == "'holder' reaches the model around it without registering it."
    assert "behind both" not in str(error.hint)


def test_a_trunk_that_reaches_a_heads_own_is_refused() -> None:
    error = unregistered(Holding(lambda model: [model.pair]), "holder")
    assert error.what == "'holder' reaches 'pair' without registering it."
    assert error.why == "each branch behind has a 'pair.0.weight' of its own, of which it would reach head 0's"


def test_a_branch_that_reaches_what_lies_behind_the_next_split_is_refused() -> None:
    error = unregistered(Holding(lambda model: [model.pair]), "a", "holder")
    assert error.why == "each branch behind has a 'pair.0.weight' of its own, of which it would reach head 0's"


def test_a_module_that_is_opened_isnt_copied_with_what_refers_to_it() -> None:
    error = unregistered(Holding(lambda model: [model.pair]), "a", "pair.0")
    assert error.what == "'holder' reaches 'pair' without registering it."


def in_a_function(model: nn.Module) -> None:
    model.holder.forward = lambda x: model.holder.norm(model.holder.inner(x))


def in_the_forward_it_had(model: nn.Module) -> None:
    model.holder.forward = torch.no_grad()(model.holder.forward)


def in_a_method(model: nn.Module) -> None:
    forward = model.holder.forward
    model.holder.forward = types.MethodType(lambda self, x: forward(x) * 2, model.holder)


def in_a_global(model: nn.Module) -> None:
    scope: dict[str, Any] = {"model": model}
    exec("model.holder.forward = lambda x: [model.holder(x) for _ in range(1)][0]", scope)


def in_a_class(model: nn.Module) -> None:
    class Closes(Holder):
        def forward(self, x: Tensor) -> Tensor:
            return model.holder.norm(self.inner(x))

    model.holder.__class__ = Closes


@pytest.mark.parametrize("patch", [in_a_function, in_the_forward_it_had, in_a_method, in_a_global, in_a_class])
def test_a_function_that_reaches_the_very_module_is_refused_since_it_isnt_copied(patch: Any) -> None:
    model = Holding()
    patch(model)
    error = unregistered(model, "a")
    assert error.what.startswith("'holder' reaches ")
    assert str(error.where).startswith("holder.forward")
    assert "types.MethodType(function, module)" in str(error.hint)


def test_a_function_that_reaches_a_heads_own_parameter_would_take_head_0s_in_every_branch() -> None:
    model = Holding(lambda model: (lambda weight: lambda x: F.linear(x, weight))(model.holder.inner.weight))
    error = unregistered(model, "a")
    assert error.why == (
        "functions, weak references and opened modules aren't copied: "
        "every head would use head 0's 'holder.inner.weight'"
    )


def test_a_buffer_of_a_branch_reached_through_a_function_is_refused() -> None:
    unregistered(Holding(lambda model: (lambda mean: lambda x: x - mean)(model.holder.norm.running_mean)), "a")


class Both(nn.Module):
    """Calls ``cell`` in front of ``mix`` and behind."""

    def __init__(self, hold: Callable[[Any], Any]) -> None:
        super().__init__()
        self.cell, self.mix, self.last = Holder(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.cell.__dict__["held"] = hold(self.cell)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(self.mix(self.cell(x))))


def test_a_module_called_on_both_sides_is_refused_where_it_holds_its_own_weight_unregistered() -> None:
    error = unregistered(Both(lambda cell: [cell.inner.weight]), "mix")
    assert error.what == "'cell' reaches 'cell.inner.weight' without registering it."
    assert "could not be rescaled" in str(error.why)
    fxcollab.transform(Both(lambda cell: [cell.inner]), splits=["mix"], init="copy-anyway")


def test_independent_instances_may_not_reach_one_another() -> None:
    model = Holding(lambda model: (lambda a: lambda x: a(x))(model.a))
    with pytest.raises(SplitError, match="'holder' reaches 'a' without registering it") as caught:
        fxcollab.transform(model, "multi-instance", init="copy-anyway")
    assert "splits" not in str(caught.value.hint)
    fxcollab.transform(Holding(lambda model: [model.a]), "multi-instance", init="copy-anyway")


def ringed(model: nn.Module) -> list[Any]:
    ring: list[Any] = [model.holder.inner]
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    "hold",
    [
        lambda model: None,
        lambda model: [model.holder.inner, {"key": (model.holder.norm,)}],
        lambda model: (model.holder.inner.weight, model.holder.norm.running_mean),
        lambda model: [model.holder],
        lambda model: model.holder.forward,
        lambda model: partial(model.holder.inner, 1),
        lambda model: Slot(model.holder.inner).call,
        lambda model: [model.pair, model.pair[0].weight],
        lambda model: nn.Linear(4, 4),
        lambda model: [model.table, Slot(model.table)],
        lambda model: (lambda table: lambda x: x * table)(model.table),
        lambda model: (F.relu, torch.relu, nn.Linear, print, lambda x: F.relu(x).cell),
        lambda model: nn.Linear,
        ringed,
    ],
)
def test_what_is_copied_with_the_module_or_constant_may_be_held_anywhere(hold: Any) -> None:
    model = Holding(hold)
    fxcollab.transform(model, splits=["a"], init="copy-anyway")


def test_state_may_be_held_anyhow_where_module_and_state_lie_in_the_trunk() -> None:
    for hold in (lambda a: [a.weight], lambda a: lambda x: F.linear(x, a.weight), weakref.ref):
        model = Holding()
        model.a.__dict__["held"] = hold(model.a)
        fxcollab.transform(model, splits=["holder"], init="copy-anyway")
    fxcollab.transform(Holding(lambda model: model.a), splits=["holder"], init="copy-anyway")


def test_attributes_of_a_name_that_also_is_a_global_reach_nothing() -> None:
    model = Holding()
    scope: dict[str, Any] = {"inner": model}
    exec("function = lambda x, self: self.inner(x)", scope)
    model.holder.held = scope["function"]
    fxcollab.transform(model, splits=["a"], init="copy-anyway")


def test_hooks_may_watch_what_they_like() -> None:
    model, seen = Holding(), []
    seen.append(model.holder)
    model.holder.register_forward_hook(lambda module, inputs, output: seen.append(model.a))
    fxcollab.transform(model, splits=["a"], init="copy-anyway")


@pytest.mark.parametrize("split", ["first", "mix"])
def test_what_torchs_own_modules_hold_is_no_reason_to_refuse(split: str) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.mix = nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 4)
            self.last = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4), backend="eager"))
            self.last[0].compile(backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(self.mix(self.lstm(self.first(x))[0]))[0])

    fxcollab.transform(Sequence(), splits=[split], init="copy-anyway")
