"""Splits that are chosen: by which objective, within which budgets, and what is said of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxcollab
from fxcollab import Candidate, CaptureError, Option, PatternError, SplitError, choose_splits
from fxcollab.plan import plan_of
from fxcollab.splits.option import rank, thinned
from samples.networks import densenet40_12, resnet32
from tests.speeds import slow_but
from tests.untouched import Untouched

IMAGES = (torch.zeros(16, 3, 32, 32),)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def stack(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


# The paper's choices.


@pytest.mark.slow
def test_resnet50_is_split_where_the_paper_splits_it() -> None:
    assert choose_splits(on_meta(torchvision.models.resnet50)).splits == ("layer2", "layer3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "expected"),
    [(resnet32, ("stage1", "stage2")), (densenet40_12, ("block1", "block2"))],
    ids=["resnet32", "densenet40-12"],
)
def test_networks_for_cifar_are_split_behind_their_first_and_second_block(make: Any, expected: Any) -> None:
    chosen = choose_splits(on_meta(make), IMAGES).splits
    assert tuple(name.replace("transition", "block") for name in chosen) == expected


def test_simple_sharing_takes_one_split() -> None:
    train_model = fxcollab.transform(on_meta(resnet32), "simple", "auto", heads=3, example_inputs=IMAGES)
    tree = plan_of(train_model).tree
    assert len(tree.splits) == 1 and tree.fanouts == (3,)


# The objective and its ties.


def candidate(name: str, share: float, ends_stage: bool = False) -> Candidate:
    around = round(1000 * share), round(1000 * (1 - share))
    return Candidate(name, True, (1,), "float32", around, around, around, ends_stage=ends_stage)


def options(*candidates: Candidate) -> list[Option]:
    return [Option(cuts, (2, 2), 1.0) for cuts in combinations(candidates, 2)]


def best(*candidates: Candidate) -> tuple[str, ...]:
    return next(iter(rank(options(*candidates), fxcollab.evenness))).splits


def test_evenness_counts_levels_by_their_work() -> None:
    [even] = options(candidate("a", 1 / 3), candidate("b", 2 / 3))
    [idle] = options(candidate("a", 1 / 2), candidate("b", 1.0))
    assert fxcollab.evenness(even) == pytest.approx(3, rel=1e-3)
    assert fxcollab.evenness(idle) == pytest.approx(2)


def test_without_stages_the_work_is_divided_evenly() -> None:
    assert best(*(candidate(f"block{i}", i / 9) for i in range(1, 9))) == ("block3", "block6")


def test_ends_of_stages_win_ties() -> None:
    assert best(candidate("a", 0.33), candidate("b", 0.67), candidate("c", 0.4, True), candidate("d", 0.8, True)) == (
        "c",
        "d",
    )


def test_ends_of_stages_that_leave_a_level_idle_do_not_win() -> None:
    assert best(
        candidate("a", 0.33), candidate("b", 0.67), candidate("c", 0.5, True), candidate("d", 0.99, True)
    ) == ("a", "b")


def test_of_equals_the_shallower_name_is_taken() -> None:
    assert best(candidate("x.y", 0.33), candidate("a", 0.33), candidate("b", 0.67))[0] == "a"


def test_an_objective_of_ones_own_decides() -> None:
    def earliest(option: Option) -> float:
        return 100 - option.cuts[-1].share

    chosen = choose_splits(stack(8, 8, 8, 8, 8, 8), (torch.zeros(2, 8),), objective=earliest)
    assert chosen.splits == ("0", "1") and "earliest" in chosen.reason


def test_ends_of_stages_win_only_equals_by_an_objective_of_ones_own() -> None:
    found = options(candidate("a", 0.3), candidate("b", 0.6), candidate("c", 0.6, True), candidate("d", 0.9, True))

    def late(option: Option) -> float:
        return round(option.cuts[0].share, 1)

    def early(option: Option) -> float:
        return -option.cuts[0].share

    assert next(iter(rank(found, late))).splits == ("c", "d")
    assert next(iter(rank(found, early))).splits[0] == "a"


@pytest.mark.parametrize("value", [float("nan"), None, "much"])
def test_an_objective_that_gives_no_number_is_refused(value: Any) -> None:
    with pytest.raises(PatternError, match="The objective gives"):
        rank(options(candidate("a", 0.3), candidate("b", 0.6)), lambda option: value)


def test_very_many_candidates_are_thinned_to_those_that_divide_the_work() -> None:
    many = {place: candidate(f"block{place}", place / 5001, place % 1000 == 0) for place in range(1, 5001)}
    kept = thinned(many, 3)
    assert math.comb(len(kept), 3) <= 5000
    assert {1000, 2000, 3000, 4000} <= set(kept)
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) < 2 * 5000 / len(kept)


# Costs and budgets.


class Narrowing(nn.Module):
    """A costly stage, a cheap one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.pool = nn.MaxPool2d(2)
        self.narrow = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.narrow(self.pool(self.wide(x))).mean((2, 3)))


@pytest.mark.slow
def test_the_choice_and_the_summary_have_the_same_numbers() -> None:
    model = Narrowing()
    choice = choose_splits(model, IMAGES)
    summary = fxcollab.summarise(fxcollab.transform(model, splits="auto", example_inputs=IMAGES))
    assert (
        choice.costs == summary.costs == fxcollab.training_costs(model, splits=choice.splits, example_inputs=IMAGES)
    )
    assert choice.option.time == pytest.approx(choice.costs.flops)


@pytest.mark.parametrize(
    ("max_time", "max_memory"),
    [
        pytest.param(1.6, None, marks=pytest.mark.slow),
        (None, 1.5),
        pytest.param(2.0, 1.7, marks=pytest.mark.slow),
        pytest.param(1.3, 1.3, marks=pytest.mark.slow),
    ],
)
def test_budgets_are_kept(max_time: float | None, max_memory: float | None) -> None:
    free = choose_splits(Narrowing(), IMAGES).costs
    choice = choose_splits(Narrowing(), IMAGES, max_time=max_time, max_memory=max_memory)
    assert choice.costs.time <= (max_time or math.inf) and choice.costs.memory <= (max_memory or math.inf)
    assert free.time > (max_time or math.inf) or free.memory > (max_memory or math.inf)
    train_model = fxcollab.transform(
        Narrowing(), splits="auto", example_inputs=IMAGES, max_time=max_time, max_memory=max_memory
    )
    assert plan_of(train_model).tree.splits == choice.splits


def test_a_budget_of_memory_may_be_a_size() -> None:
    free = choose_splits(Narrowing(), IMAGES).costs
    limit = free.original.memory * 1.5
    kept = choose_splits(Narrowing(), IMAGES, max_memory=f"{limit / 1e6:.4f}MB").costs
    assert kept == choose_splits(Narrowing(), IMAGES, max_memory="1.5x").costs
    assert kept.training.memory <= limit < free.training.memory


@pytest.mark.parametrize("text", ["0.1MB", "1 KiB"])
def test_a_size_that_the_original_needs_itself_is_refused(text: str) -> None:
    with pytest.raises(PatternError, match="MB of memory can't be kept") as caught:
        choose_splits(Narrowing(), IMAGES, max_memory=text)
    hint = str(caught.value.hint).partition("max_memory=")[2].partition("'")[2].partition("'")[0]
    assert choose_splits(Narrowing(), IMAGES, max_memory=hint)


@pytest.mark.parametrize("limits", [{"max_time": "2GB"}, {"max_memory": "2 bytes"}, {"max_memory": ""}])
def test_a_budget_that_cannot_be_read_is_refused(limits: Any) -> None:
    with pytest.raises(PatternError, match="can't be read"):
        choose_splits(stack(8, 8, 8), (X,), **limits)


def test_budgets_with_recompute_are_those_of_the_graph_that_computes_again() -> None:
    plain = choose_splits(Narrowing(), IMAGES, max_memory=1.6)
    choice = choose_splits(Narrowing(), IMAGES, max_memory=1.6, recompute="heads")
    assert choice.value > plain.value and choice.costs.memory <= 1.6
    assert choice.option.time == pytest.approx(choice.costs.time)
    train_model = fxcollab.transform(
        Narrowing(), splits="auto", example_inputs=IMAGES, max_memory=1.6, recompute="heads"
    )
    assert plan_of(train_model).tree.splits == choice.splits
    assert fxcollab.summarise(train_model).costs == choice.costs


def test_runners_up_and_refusals_say_what_recompute_would_make_fit() -> None:
    first = choose_splits(Narrowing(), IMAGES, max_memory=1.6).runners_up[0]
    assert "recompute keeps it" in first.why
    costs = fxcollab.training_costs(Narrowing(), splits=first.option.splits, example_inputs=IMAGES, recompute="heads")
    assert costs.memory <= 1.6 and f"{costs.memory:.2f}x the memory" in first.why


@pytest.mark.parametrize("limits", [{"max_time": 1.75}, {"max_memory": 1.4, "recompute": "heads"}])
def test_the_tree_is_chosen_under_a_budget(limits: Any) -> None:
    choice = choose_splits(Narrowing(), IMAGES, fanouts="auto", **limits)
    others = [choose_splits(Narrowing(), IMAGES, fanouts=fanouts, **limits) for fanouts in ((2,), (2, 2))]
    assert choice.value >= max(other.value for other in others)
    assert choice.costs.time <= limits.get("max_time", math.inf)
    assert f"make {choice.option.heads} heads" in choice.reason
    train_model = fxcollab.transform(Narrowing(), splits="auto", fanouts="auto", example_inputs=IMAGES, **limits)
    assert plan_of(train_model).tree.fanouts == choice.option.fanouts


def test_of_equally_even_trees_the_one_with_more_heads_is_chosen() -> None:
    choice = choose_splits(stack(8, 8, 8), (X,), fanouts="auto", max_time=2.5)
    assert choice.option.fanouts == (3,) and choice.costs.time <= 2.5


def test_a_tree_is_chosen_with_its_splits_and_under_a_budget_only() -> None:
    with pytest.raises(PatternError, match="without a budget"):
        choose_splits(Narrowing(), IMAGES, fanouts="auto")
    with pytest.raises(PatternError, match="chosen with the splits"):
        fxcollab.transform(Narrowing(), splits="wide", fanouts="auto")
    for more in ({"heads": 3}, {"pattern": "ladder"}):
        with pytest.raises(PatternError, match="for a given number of heads, nor"):
            fxcollab.transform(Narrowing(), splits="auto", fanouts="auto", max_time=2, **more)  # type: ignore[arg-type]


def test_what_a_budget_ruled_out_is_told() -> None:
    choice = choose_splits(Narrowing(), IMAGES, max_time=1.6)
    first = choice.runners_up[0]
    assert first.option.time > 1.6 and first.why == "over the budget of 1.6x"


class Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, values: list[Tensor]) -> None:
        values.append(self.layer(values[-1]))


class Reads(nn.Module):
    def forward(self, values: list[Tensor]) -> Tensor:
        return values[-1]


class KeepsAList(nn.Module):
    """No split can lie inside: what is appended to the list would be lost."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.appends, self.reads = nn.Linear(8, 8), Appends(), Reads()

    def forward(self, x: Tensor) -> Tensor:
        values = [self.layer(x)]
        self.appends(values)
        out: Tensor = self.reads(values)
        return out


def test_cuts_that_no_capture_allows_are_passed_over() -> None:
    model = nn.Sequential(nn.Linear(8, 8), KeepsAList(), nn.Linear(8, 8))
    assert "1.layer" in [found.name for found in fxcollab.find_splits(model, (X,))]
    with pytest.raises(CaptureError, match="changes a list"):
        fxcollab.transform(model, splits="1.layer", example_inputs=(X,))
    choice = choose_splits(model, (X,), fanouts=(2,))
    assert choice.splits in (("0",), ("1",))
    assert any("changes a list" in other.why for other in choice.runners_up)


def every_choice(model: nn.Module) -> dict[tuple[str, ...], fxcollab.Costs]:
    """All pairs of candidates that can be cut, by brute force."""
    names = [found.name for found in fxcollab.find_splits(model, IMAGES)]
    costs = {}
    for pair in combinations(names, 2):
        with suppress(SplitError):
            costs[pair] = fxcollab.training_costs(model, splits=pair, example_inputs=IMAGES)
    return costs


@pytest.mark.slow
def test_where_nothing_fits_the_cheapest_is_named() -> None:
    costs = every_choice(Narrowing()).values()
    with pytest.raises(SplitError) as caught:
        choose_splits(Narrowing(), IMAGES, max_time=1.0)
    assert f"{min(cost.time for cost in costs):.2f}x the time" in str(caught.value.why)
    with pytest.raises(SplitError) as caught:
        choose_splits(Narrowing(), IMAGES, max_memory=1.0)
    assert f"{min(cost.memory for cost in costs):.2f}x the memory" in str(caught.value.why)
    assert caught.value.what == "No choice of 2 splits keeps within 1x the memory."


@pytest.mark.slow
def test_what_fits_is_never_refused() -> None:
    least = min(cost.memory for cost in every_choice(Narrowing()).values())
    assert choose_splits(Narrowing(), IMAGES, max_memory=least + 1e-9).costs.memory == pytest.approx(least)


class Clamped(nn.Module):
    """Writes into a parameter, as CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        self.scale.data.clamp_(max=4.6)
        return self.c(self.b(self.a(x))) * self.scale


def test_costs_leave_parameters_that_a_forward_writes_as_they_are() -> None:
    model = Clamped()
    fxcollab.training_costs(model, splits=["a"], example_inputs=(torch.zeros(2, 8),))
    assert model.scale.item() == 9.0


@pytest.mark.slow
@pytest.mark.parametrize("mode", slow_but([torch.no_grad], [torch.no_grad, torch.inference_mode]))
def test_costs_do_not_depend_on_the_callers_grad_mode(mode: Any) -> None:
    model = Narrowing()
    expected = choose_splits(model, IMAGES)
    with mode():
        assert choose_splits(model, IMAGES) == expected


def test_choosing_leaves_the_model_as_it_is() -> None:
    model = Narrowing().eval()
    untouched = Untouched(model)
    choose_splits(model, IMAGES)
    assert untouched.differences() == []


# Bad input.


class Twins(nn.Module):
    """Two values go side by side from the first layer to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        left, right = self.a(x), self.b(x)
        return self.d(left) + self.c(right)


X = torch.zeros(2, 8)


def test_a_model_that_can_be_cut_once_is_not_cut_twice() -> None:
    assert choose_splits(Twins(), (X,), fanouts=(3,)).splits == ("a+b",)
    with pytest.raises(SplitError, match="Twins can't be split 2 times") as caught:
        choose_splits(Twins(), (X,))
    assert "ask for 1 split, or" in str(caught.value.hint)


def test_more_levels_than_cuts_are_refused() -> None:
    with pytest.raises(SplitError) as caught:
        choose_splits(stack(8, 8, 8), (X,), fanouts=(2, 2, 2))
    assert caught.value.what == "Sequential can't be split 3 times."
    assert "only 0" in str(caught.value.why) and "ask for 1 split, or" in str(caught.value.hint)


@pytest.mark.parametrize("limit", [0.9, 0.0, -1.0, float("nan")])
def test_a_budget_below_one_is_refused(limit: float) -> None:
    with pytest.raises(PatternError, match="can't be kept") as caught:
        choose_splits(stack(8, 8, 8), (X,), max_time=limit)
    assert "max_time=1.75" in str(caught.value.hint)


def test_an_input_that_the_model_rejects_is_told_as_such() -> None:
    for call in (choose_splits, fxcollab.find_splits):
        with pytest.raises(CaptureError) as caught:
            call(Narrowing(), (torch.zeros(2, 4, 32, 32),))  # type: ignore[operator]
        assert caught.value.what == "Narrowing fails on input 2x4x32x32."
        assert "3 channels" in str(caught.value.why)


def test_named_splits_have_no_budget() -> None:
    with pytest.raises(PatternError, match="have no budget"):
        fxcollab.transform(stack(8, 8, 8), splits="0", max_time=2.0)


def test_independent_instances_have_no_splits_to_choose() -> None:
    with pytest.raises(PatternError, match="takes no splits"):
        fxcollab.transform(stack(8, 8, 8), "multi-instance", "auto")


@pytest.mark.parametrize(
    ("arguments", "fanouts"),
    [
        ({}, (2, 2)),
        ({"heads": 8}, (2, 2, 2)),
        ({"fanouts": (3,)}, (3,)),
        ({"heads": 2}, (2,)),
        ({"pattern": "ladder"}, (2, (2, 1))),
        ({"pattern": "ladder", "heads": 4}, (2, (2, 1), (2, 1, 1))),
        ({"pattern": "simple", "heads": 3}, (3,)),
    ],
)
def test_heads_and_fanouts_say_how_many_splits_are_chosen(arguments: Any, fanouts: Any) -> None:
    train_model = fxcollab.transform(stack(8, 8, 8, 8, 8, 8), splits="auto", example_inputs=(X,), **arguments)
    assert plan_of(train_model).tree.fanouts == fanouts


def test_heads_that_no_binary_tree_has_are_refused() -> None:
    with pytest.raises(PatternError, match="make 2 heads, not 3"):
        fxcollab.transform(stack(8, 8, 8, 8), splits="auto", heads=3, example_inputs=(X,))


def test_work_that_nobody_counts_cannot_be_divided() -> None:
    with pytest.raises(SplitError, match="can't be chosen"):
        choose_splits(nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)), (X,))


def test_wrong_fanouts_are_refused() -> None:
    with pytest.raises(PatternError, match="need 1 fan-outs, not 0"):
        choose_splits(stack(8, 8, 8), (X,), fanouts=())
    with pytest.raises(fxcollab.ArgumentTypeError, match="fanouts is of type int"):
        choose_splits(stack(8, 8, 8), (X,), fanouts=3)  # type: ignore[arg-type]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.b(self.a(batch["x"]))


def test_structures_of_tensors_are_refused() -> None:
    with pytest.raises(CaptureError, match="can't be computed") as caught:
        choose_splits(Wrapped(), ({"x": X},), fanouts=(2,))
    assert "only tensors are supported" in str(caught.value.why)


def test_costs_of_splits_that_are_still_to_be_chosen_are_refused() -> None:
    with pytest.raises(PatternError) as caught:
        fxcollab.training_costs(stack(8, 8, 8), splits="auto", example_inputs=(X,))
    assert "choose_splits" in str(caught.value.hint)


def test_the_reason_of_a_choice_stands_in_plan_summary_and_artifact(tmp_path: Path) -> None:
    model = stack(8, 8, 8, 8, 8)
    train_model = fxcollab.transform(copy.deepcopy(model), splits="auto", example_inputs=(X,), seed=0)
    reason = fxcollab.choose_splits(model, (X,)).reason
    assert fxcollab.summarise(train_model).chosen == reason
    fxcollab.save(train_model, tmp_path / "run")
    assert plan_of(fxcollab.load(tmp_path / "run", model)).chosen == reason
    named = fxcollab.transform(model, splits=plan_of(train_model).tree.splits, example_inputs=(X,), seed=0)
    assert fxcollab.summarise(named).chosen is None


@pytest.mark.slow
def test_a_choice_is_transformed_by() -> None:
    model = resnet32()
    choice = fxcollab.choose_splits(model, fanouts=(3, 2))
    train_model = fxcollab.transform(model, splits=choice, seed=0)
    assert plan_of(train_model).tree == fxcollab.HeadTree(choice.splits, (3, 2))
    with pytest.raises(PatternError, match=r"chosen for fan-outs \(3, 2\), not for \(2, 2\)"):
        fxcollab.transform(model, splits=choice, fanouts=(2, 2))
    for fanouts in ((2,), (3,), (2, 2, 2)):
        other = fxcollab.choose_splits(model, fanouts=fanouts)
        tree = plan_of(fxcollab.transform(model, splits=other, seed=0)).tree
        assert tree == fxcollab.HeadTree(other.splits, fanouts)
    one = fxcollab.choose_splits(model, fanouts=(3,))
    assert plan_of(fxcollab.transform(model, "simple", one, seed=0)).tree.heads == 3
    with pytest.raises(PatternError, match="not those of pattern 'simple'"):
        fxcollab.transform(model, "simple", choice)
    with pytest.raises(PatternError, match="not those of pattern 'multi-instance'"):
        fxcollab.transform(model, "multi-instance", one)
    given = fxcollab.choose_splits(model, torch.randn(4, 3, 40, 40))
    assert plan_of(fxcollab.transform(model, splits=given, seed=0)).interface.inputs[0].shape == (4, 3, 40, 40)
