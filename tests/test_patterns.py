"""Patterns of one's own: registered, offered by a package, or named as a function of a module."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcollab
from fxcollab import HeadTree, patterns
from fxcollab.errors import PatternError, SourceError
from fxcollab.patterns import head_tree
from fxcollab.plan import plan_of


def stack(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(patterns, "_registered", {})
    yield


def mirrored(splits: Sequence[str]) -> HeadTree:
    """A ladder on its other side: the last branch splits again."""
    return HeadTree(tuple(splits), tuple((*(1,) * level, 2) if level else 2 for level in range(len(splits))))


def test_a_registered_pattern_trains_verifies_saves_and_prunes(tmp_path: Path) -> None:
    assert fxcollab.register_pattern("mirrored")(mirrored) is mirrored
    model = stack(8, 8, 8, 8)
    train_model = fxcollab.transform(model, "mirrored", ["0", "1"], example_inputs=(X,), seed=0)
    assert plan_of(train_model).pattern == "mirrored"
    assert plan_of(train_model).tree == HeadTree(("0", "1"), (2, (1, 2)))
    fxcollab.verify(model, train_model).raise_if_failed()
    fxcollab.save(train_model, tmp_path / "saved")
    patterns._registered.clear()  # whoever loads it needs no code of the pattern
    loaded = fxcollab.load(tmp_path / "saved", stack(8, 8, 8, 8))
    assert plan_of(loaded).pattern == "mirrored"
    assert [
        torch.equal(a, b)
        for a, b in zip(fxcollab.all_heads(train_model.eval())(X), fxcollab.all_heads(loaded.eval())(X), strict=True)
    ] == [True] * 3


def test_heads_and_fanouts_are_given_to_patterns_that_take_them() -> None:
    @fxcollab.register_pattern("wide")
    def wide(splits: Sequence[str], heads: int = 4) -> HeadTree:
        return HeadTree(tuple(splits), (heads, *(2,) * (len(splits) - 1)))

    @fxcollab.register_pattern("doubled")
    def doubled(splits: Sequence[str], fanouts: Sequence[int] = (2,)) -> HeadTree:
        return HeadTree(tuple(splits), tuple(2 * count for count in fanouts))

    assert head_tree("wide", ["a"], 6) == HeadTree(("a",), (6,))
    assert head_tree("doubled", ["a", "b"], None, (1, 2)) == HeadTree(("a", "b"), (2, 4))
    with pytest.raises(PatternError, match="takes no fan-outs"):
        head_tree("wide", ["a"], fanouts=(2,))
    with pytest.raises(PatternError, match="make 2 heads, not 3"):
        head_tree("doubled", ["a"], 3, (1,))


def test_splits_of_a_registered_pattern_are_chosen() -> None:
    fxcollab.register_pattern("mirrored")(mirrored)
    train_model = fxcollab.transform(stack(8, 8, 8, 8, 8), "mirrored", "auto", example_inputs=(X,))
    assert plan_of(train_model).tree.fanouts == (2, (1, 2))


def test_a_function_of_a_module_is_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trees_of_mine.py").write_text(
        "import fxcollab\nN = 3\ndef forks(splits, heads=3):\n    return fxcollab.HeadTree(splits, (heads,))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert head_tree("trees_of_mine:forks", ["a"]) == HeadTree(("a",), (3,))
    with pytest.raises(SourceError, match="has no `fork`"):
        head_tree("trees_of_mine:fork", ["a"])
    with pytest.raises(PatternError, match="trees_of_mine:N is not a function"):
        head_tree("trees_of_mine:N", ["a"])
    with pytest.raises(SourceError, match="no module"):
        head_tree("trees_of_yours:forks", ["a"])


def test_an_installed_package_offers_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("offered", f"{__name__}:mirrored", patterns.GROUP)
    monkeypatch.setattr(patterns, "entry_points", lambda group: [point] if group == patterns.GROUP else [])
    assert head_tree("offered", ["a", "b"]) == HeadTree(("a", "b"), (2, (1, 2)))
    with pytest.raises(PatternError, match="no pattern 'offerd'") as caught:
        head_tree("offerd", ["a"])
    assert "did you mean offered?" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["simple", "ladder"])
def test_built_in_patterns_are_not_replaced(name: str) -> None:
    with pytest.raises(PatternError, match="is built in"):
        fxcollab.register_pattern(name)


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ((2, 2), "returns a value of type tuple"),
        (HeadTree(("a",), (1,)), "at least 2 heads"),
        (HeadTree(("a",), (2, 2)), "1 splits need 1 fan-outs"),
        (HeadTree(("a",), ((2, 2),)), "don't fit a level of 1 branches"),
        (HeadTree(("a",), (10**9,)), "1,000,000,000 heads is too large"),
        (HeadTree((), (2, 2)), "2 levels without splits"),
    ],
)
def test_what_a_pattern_returns_is_checked(returned: Any, what: str) -> None:
    fxcollab.register_pattern("wrong")(lambda splits: returned)
    with pytest.raises(PatternError) as caught:
        head_tree("wrong", ["a"])
    assert what in caught.value.what


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_the_arguments_that_make_a_built_in_patterns_tree_are_known(pattern: str) -> None:
    takes = inspect.signature(patterns._BUILT_IN[pattern]).parameters
    splits = ("a", "b")[: 1 if pattern == "simple" else 2] if "splits" in takes else ()
    tree = head_tree(pattern, splits)
    assert patterns.is_made_by(pattern, tree)
    assert head_tree(pattern, **patterns.arguments_for(pattern, tree)) == tree
    assert patterns.is_made_by("hierarchical", tree) is bool(splits)
    assert not patterns.is_made_by(pattern, HeadTree(("a", "b"), (2, (3, 1)))) or pattern == "hierarchical"


@pytest.mark.parametrize("wrong", [lambda splits: splits["a"], lambda splits: 1 / 0, os.fspath])
def test_a_pattern_that_fails_is_named_with_its_error(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(patterns._registered, "failing", wrong)
    with pytest.raises(PatternError, match="Pattern 'failing' failed") as caught:
        head_tree("failing", ["a"] if wrong is not os.fspath else [])
    assert type(caught.value.__cause__).__name__ in str(caught.value.why)
