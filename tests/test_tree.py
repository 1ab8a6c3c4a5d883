"""The head tree: patterns, paths, names, factors, and what is said when arguments don't fit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from fxcollab.errors import PatternError
from fxcollab.patterns import head_tree
from fxcollab.tree import HeadTree, branch_name, hierarchical, ladder, multi_instance, parse_branch_name

# ------------------------------------------------------------------------------------------------ patterns


def test_multi_instance_has_one_level_and_no_split() -> None:
    tree = multi_instance(3)
    assert tree == HeadTree((), (3,))
    assert (tree.depth, tree.heads) == (1, 3)


def test_simple_has_one_split() -> None:
    tree = head_tree("simple", ["layer2"], 4)
    assert tree == HeadTree(("layer2",), (4,))
    assert (tree.depth, tree.heads) == (1, 4)


def test_hierarchical_is_binary_unless_said() -> None:
    assert hierarchical(["a", "b", "c"]) == HeadTree(("a", "b", "c"), (2, 2, 2))
    assert hierarchical(["a", "b", "c"]).heads == 8


@pytest.mark.parametrize(("fanouts", "heads"), [((2,), 2), ((2, 3), 6), ((4, 2), 8), ((2, 2, 2), 8)])
def test_heads_are_the_product_of_the_fanouts(fanouts: tuple[int, ...], heads: int) -> None:
    tree = hierarchical("abc"[: len(fanouts)], fanouts)
    assert tree.heads == heads == len(list(tree.paths(tree.depth)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("multi-instance",), multi_instance(2)),
        (("multi-instance", (), 3), multi_instance(3)),
        (("simple", ["a"]), HeadTree(("a",), (2,))),
        (("simple", ["a"], 5), HeadTree(("a",), (5,))),
        (("hierarchical", ["a", "b"]), hierarchical(["a", "b"])),
        (("ladder", ["a", "b", "c"]), HeadTree(("a", "b", "c"), (2, (2, 1), (2, 1, 1)))),
        (("ladder", ["a"]), HeadTree(("a",), (2,))),
        (("hierarchical", ["a", "b"], None, (2, 3)), hierarchical(["a", "b"], (2, 3))),
        (("hierarchical", ["a", "b"], 6, (2, 3)), hierarchical(["a", "b"], (2, 3))),
        (("hierarchical", ("a+b",), None, [3]), HeadTree(("a+b",), (3,))),
    ],
)
def test_named_patterns_are_constructors_of_the_tree(arguments: tuple[Any, ...], expected: HeadTree) -> None:
    assert head_tree(*arguments) == expected


# ----------------------------------------------------------------------------------------- paths and names


def test_paths_are_in_head_order() -> None:
    tree = hierarchical(["a", "b"], (2, 3))
    assert list(tree.paths(0)) == [()]
    assert list(tree.paths(1)) == [(0,), (1,)]
    assert list(tree.paths(2)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("fanouts", [(2,), (5,), (2, 3), (4, 2), (3, 2, 4)])
def test_head_path_is_the_position_in_the_paths(fanouts: tuple[int, ...]) -> None:
    tree = HeadTree((), fanouts)
    assert [tree.head_path(head) for head in range(tree.heads)] == list(tree.paths(tree.depth))


def test_peers_are_all_branches_but_those_of_zeros() -> None:
    tree = hierarchical(["a", "b"])
    assert list(map(branch_name, tree.peers())) == ["b1", "b0_1", "b1_0", "b1_1"]


@pytest.mark.parametrize(("path", "name"), [((1,), "b1"), ((0, 1), "b0_1"), ((10, 0, 2), "b10_0_2"), ((0,), "b0")])
def test_branch_names_are_read_back(path: tuple[int, ...], name: str) -> None:
    assert branch_name(path) == name
    assert parse_branch_name(name) == path


@pytest.mark.parametrize("name", ["", "b", "b_1", "b1_", "layer1", "bn1", "b1.conv", "xb1", "b1x", "b-1"])
def test_other_names_are_no_branches(name: str) -> None:
    assert parse_branch_name(name) is None


# ------------------------------------------------------------------------------------------------- factors


def test_factor_of_a_split_is_one_over_its_fanout() -> None:
    tree = hierarchical("abc", (2, 3, 4))
    first = [(0,) * level for level in range(4)]
    assert [tree.factor(first[k], first[k + 1]) for k in range(3)] == [1 / 2, 1 / 3, 1 / 4]


def test_factor_of_a_skip_is_the_product() -> None:
    tree = hierarchical("abc", (2, 3, 4))
    for shallow, deep in itertools.combinations(range(4), 2):
        product = math.prod(tree.factor((0,) * k, (0,) * (k + 1)) for k in range(shallow, deep))
        assert tree.factor((0,) * shallow, (0,) * deep) == pytest.approx(product, rel=1e-15)
    assert tree.factor((), (1, 2, 3)) == 1 / 24


def test_factor_in_an_uneven_tree_is_the_readers_share_of_the_heads() -> None:
    tree = hierarchical("ab", (2, (2, 1)))
    assert [tree.factor((), path) for path in ((0,), (1,), (1, 0))] == [2 / 3, 1 / 3, 1 / 3]
    assert [tree.factor((0,), (0, 1)), tree.factor((1,), (1, 0))] == [1 / 2, 1.0]


def test_factor_within_a_level_is_one() -> None:
    assert all(hierarchical("ab").factor((0,) * level, (0,) * level) == 1.0 for level in range(3))


# ------------------------------------------------------------------------------------------------ messages


def refusal(*arguments: Any, **keywords: Any) -> PatternError:
    with pytest.raises(PatternError) as caught:
        head_tree(*arguments, **keywords)
    return caught.value


ALL = "There are multi-instance, simple, hierarchical, ladder; or name a function, as in package.module:NAME."


@pytest.mark.parametrize("heads", [1, 0, -3])
@pytest.mark.parametrize(("pattern", "splits"), [("multi-instance", ()), ("simple", ["a"])])
def test_fewer_than_two_heads_are_refused(pattern: str, splits: list[str], heads: int) -> None:
    error = refusal(pattern, splits, heads)
    assert error.what == f"Collaborative learning needs at least 2 heads, but heads is {heads}."
    assert error.why == "a head learns from the others"
    assert error.hint == "give 2 or more"


def test_a_fanout_of_one_is_refused() -> None:
    error = refusal("hierarchical", ["a", "b"], fanouts=(2, 1))
    assert error.what == "Collaborative learning needs at least 2 heads, but a fan-out is 1."


@pytest.mark.parametrize(("fanouts", "count"), [((2,), 1), ((2, 2, 2), 3), ((), 0)])
def test_fanouts_that_dont_match_the_splits_are_refused(fanouts: tuple[int, ...], count: int) -> None:
    error = refusal("hierarchical", ["a", "b"], fanouts=fanouts)
    assert error.what == f"2 splits need 2 fan-outs, not {count}."
    assert "splits are a, b" in str(error.why)
    assert error.hint == "for example fanouts=(2, 2) (--fanouts 2,2)"


def test_heads_that_arent_the_product_are_refused() -> None:
    error = refusal("hierarchical", ["a", "b"], heads=5, fanouts=(2, 3))
    assert error.what == "2 splits with fan-outs 2, 3 make 6 heads, not 5."
    assert "make 5 heads" in str(error.hint)


@pytest.mark.parametrize("pattern", ["hierarchical", "simple", "multi-instance"])
def test_a_split_named_twice_is_refused(pattern: str) -> None:
    error = refusal(pattern, ["a", "b", "a"])
    assert error.what == "Split a is named twice."
    assert error.hint == "name every split once"


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("hierarchial", "hierarchical"), ("multiinstance", "multi-instance"), ("Simple", "simple")],
)
def test_an_unknown_pattern_is_answered_with_the_closest(pattern: str, near: str) -> None:
    error = refusal(pattern, ["a"])
    assert error.what == f"There is no pattern {pattern!r}."
    assert error.hint == f"did you mean {near}? {ALL}"


def test_a_pattern_like_none_is_answered_with_all() -> None:
    assert refusal("xyz").hint == ALL


@pytest.mark.parametrize(("pattern", "splits"), [("multi-instance", ()), ("simple", ["a"])])
def test_fanouts_belong_to_hierarchical_alone(pattern: str, splits: list[str]) -> None:
    error = refusal(pattern, splits, fanouts=(2,))
    assert error.what == f"Pattern {pattern!r} takes no fan-outs."
    assert "heads=" in str(error.hint)


def test_a_ladder_has_one_head_more_than_splits() -> None:
    for count in range(1, 6):
        tree = ladder([f"s{k}" for k in range(count)])
        assert tree.heads == count + 1
        assert [tree.branches(level) for level in range(count + 1)] == list(range(1, count + 2))
        assert all(sum(1 for _ in tree.children(path)) == 1 + (not any(path)) for path in tree.paths(count - 1))
    assert refusal("ladder", ["a", "b"], heads=4).what == "2 splits with fan-outs 2, (2, 1) make 3 heads, not 4."
    assert "hierarchical" in str(refusal("ladder", ["a"], fanouts=(2,)).hint)


def test_multi_instance_takes_no_splits() -> None:
    error = refusal("multi-instance", ["a"])
    assert error.what == "Pattern 'multi-instance' takes no splits, but a is given."
    assert error.why == "its heads share nothing but the inputs"


@pytest.mark.parametrize(("pattern", "needs"), [("simple", "a split"), ("hierarchical", "a split")])
def test_a_pattern_without_its_splits_is_refused(pattern: str, needs: str) -> None:
    error = refusal(pattern)
    assert error.what == f"Pattern {pattern!r} needs {needs}."
    assert "splits=['layer2']" in str(error.hint)


def test_simple_takes_one_split() -> None:
    error = refusal("simple", ["a", "b"])
    assert error.what == "Pattern 'simple' takes one split, but a, b is given."
    assert "'a+b'" in str(error.hint)


@pytest.mark.parametrize("head", [-1, 6, 100])
def test_a_head_that_isnt_there_is_refused(head: int) -> None:
    with pytest.raises(PatternError) as caught:
        hierarchical(["a", "b"], (2, 3)).head_path(head)
    assert caught.value.what == f"There is no head {head}."
    assert caught.value.hint == "choose one of 0 to 5"


def test_heads_descend_from_their_branches() -> None:
    tree = hierarchical(["a", "b"], (2, 3))
    assert [tree.heads_of(path) for path in ((), (1,), (0, 2))] == [[0, 1, 2, 3, 4, 5], [3, 4, 5], [2]]
