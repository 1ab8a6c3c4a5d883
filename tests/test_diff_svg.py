"""The difference as a static picture, and the layout behind it."""

from __future__ import annotations

from itertools import combinations, pairwise
from xml.etree import ElementTree

import torch
import torchvision

import fxcollab
from fxcollab.diff.boxes import boxes_of
from fxcollab.diff.layered import layered
from fxcollab.diff.svg import to_svg
from tests.test_diff import Hostile, Net, diff_of

SVG = "{http://www.w3.org/2000/svg}"


def densenet() -> fxcollab.Diff:
    with torch.device("meta"):
        model = torchvision.models.densenet121()
    splits = ["features.transition1", "features.transition2"]
    return fxcollab.diff(fxcollab.transform(model, splits=splits, granularity="op", seed=0))


def test_nothing_overlaps_and_edges_go_down() -> None:
    sizes = [(100.0, 40.0), (60.0, 40.0), (80.0, 90.0), (50.0, 40.0), (120.0, 40.0), (70.0, 40.0)]
    edges = [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (0, 5), (4, 5), (3, 5)]
    found = layered(sizes, edges)
    for one, other in combinations(range(len(sizes)), 2):
        (x, y), (a, b) = found.corners[one], found.corners[other]
        (w, h), (c, d) = sizes[one], sizes[other]
        assert x + w <= a or a + c <= x or y + h <= b or b + d <= y
    for route in found.routes.values():
        assert all(upper < lower for (_, upper), (_, lower) in pairwise(route))
    assert all(x >= 0 and x + w <= found.width for (x, _), (w, _) in zip(found.corners, sizes, strict=True))


def test_a_long_edge_bends_around_what_stands_between() -> None:
    found = layered([(100.0, 40.0)] * 3, [(0, 1), (1, 2), (0, 2)])
    (left, _), (bend, _) = found.corners[1], found.routes[0, 2][1]
    assert not left < bend < left + 100


def test_nothing_and_one_thing_have_a_layout() -> None:
    assert layered([], []).corners == ()
    assert layered([(10.0, 20.0)], []).height == 20


def test_every_node_of_a_small_graph_is_drawn_in_its_branch() -> None:
    root = ElementTree.fromstring(to_svg(diff_of("stem", "body.1")))
    titles = [text.text for text in root.iter(f"{SVG}text")]
    assert titles.count("head") == 4 and titles.count("stem") >= 1
    branches = [
        "b0: heads 0 to 1",
        "b0_0: head 0",
        "b0_1: head 1",
        "b1: heads 2 to 3",
        "b1_0: head 2",
        "b1_1: head 3",
    ]
    assert set(branches) <= set(titles)
    assert sum("gradient" in str(title) for title in titles) == 3


def test_modules_stay_closed_where_there_would_be_too_much_to_read() -> None:
    box = boxes_of(densenet())
    drawn = to_svg(densenet())
    assert len(list(box.nodes())) > 1000 and drawn.count('class="node') + drawn.count('class="closed') <= 45 + 1
    assert "nodes</text>" in drawn


def test_the_picture_is_the_same_twice_and_what_notebooks_show() -> None:
    diff = diff_of("stem")
    assert to_svg(diff) == to_svg(diff_of("stem")) == diff._repr_svg_()


def test_hostile_names_are_text_in_the_picture() -> None:
    drawn = to_svg(diff_of("<script>alert('x')</script>", model=Hostile))
    assert "<script" not in drawn
    ElementTree.fromstring(drawn)


def test_independent_instances_stand_side_by_side() -> None:
    train_model = fxcollab.transform(Net(), "multi-instance", heads=3, seed=0)
    assert "b2: head 2" in to_svg(fxcollab.diff(train_model))
