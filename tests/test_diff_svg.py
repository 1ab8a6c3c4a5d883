"""The difference as a static picture, and the layout behind it."""

from __future__ import annotations

import io
import sys
from functools import partial
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import fxcollab
from fxcollab import DiffError
from fxcollab.diffs import png
from fxcollab.diffs.boxes import Box, boxes_of, fold, name_of, shown
from fxcollab.diffs.layered import layered
from fxcollab.diffs.png import to_png
from fxcollab.diffs.resources import read
from fxcollab.diffs.svg import to_svg
from tests.fonts import needs_a_font
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


@pytest.mark.slow
def test_modules_stay_closed_where_there_would_be_too_much_to_read() -> None:
    box = boxes_of(densenet())
    drawn = to_svg(densenet())
    assert len(list(box.nodes())) > 1000 and drawn.count('class="node') + drawn.count('class="closed') <= 45 + 1
    assert "nodes</text>" in drawn


@needs_a_font
def test_the_picture_is_the_same_twice() -> None:
    assert to_svg(diff_of("stem")) == to_svg(diff_of("stem"))
    assert to_png(diff_of("stem")) == to_png(diff_of("stem"))


def test_hostile_names_are_text_in_the_picture() -> None:
    drawn = to_svg(diff_of("<script>alert('x')</script>", model=Hostile))
    assert "<script" not in drawn
    ElementTree.fromstring(drawn)


def test_independent_instances_stand_side_by_side() -> None:
    train_model = fxcollab.transform(Net(), "multi-instance", heads=3, seed=0)
    assert "b2: head 2" in to_svg(fxcollab.diff(train_model))


class CalledTwice(nn.Module):
    """Its block's box is entered before and after the activation: boxes in a circle."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.act, self.head = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.block(self.act(self.block(x))) * 2)
        return result


def test_a_module_that_is_called_twice_has_one_box() -> None:
    diff = diff_of("mul", model=CalledTwice, granularity="op")
    titles = [text.text for text in ElementTree.fromstring(to_svg(diff)).iter(f"{SVG}text")]
    assert titles.count("block") == 1 and titles.count("act") == 1


# Folding.


def a_long_chain(length: int = 3000) -> fxcollab.Diff:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(length)))
    return diff_of(str(length // 2), model=lambda: model)


def test_a_flat_graph_is_folded_until_a_person_can_read_it() -> None:
    chain = a_long_chain(60)
    drawn = to_svg(chain)
    titles = [text.text for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
    assert "_0 … _30" in titles and "31 unchanged" in titles
    assert drawn.count('class="node cloned"') == 29  # what changed stays to be seen


def test_runs_hold_what_is_unchanged_and_leave_inputs_outputs_and_changes() -> None:
    box = boxes_of(diff_of("1.5", model=lambda: nn.Sequential(nn.Linear(4, 4), Chain())))
    before = shown(box)
    fold(box)
    runs = [[name_of(child) for child in run.children] for run in _runs(box)]
    assert runs == [["_0", "1"]]  # the trunk's, a layer and a box; head 0's two are not worth it
    assert shown(box) < before
    assert {name_of(box.children[0]), name_of(box.children[-1])} == {"input_1", "output"}


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Linear(4, 4) for _ in range(8)))


def _runs(box: Box) -> list[Box]:
    return [found for inner in box.boxes() for found in ([inner] if inner.kind == "run" else _runs(inner))]


# In pixels.


@needs_a_font
def test_the_picture_in_pixels_has_the_size_and_the_colours_of_the_page() -> None:
    diff = diff_of("stem", "body.1")
    root = ElementTree.fromstring(to_svg(diff))
    image = Image.open(io.BytesIO(to_png(diff)))
    assert image.size == tuple(2 * int(float(root.attrib[side])) for side in ("width", "height"))
    seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or ()}
    page = read("colours.css").partition("}")[0]
    expected = ("page", "text", "shared", "own", "cloned", "rescaled", "rescaled-line")
    assert {_rgb(page.partition(f"--{name}: #")[2][:6]) for name in expected} <= seen


@needs_a_font
def test_a_huge_picture_in_pixels_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "_SCALE", 1000.0)
    monkeypatch.setattr(png, "_MOST_PIXELS", 300_000)
    image = Image.open(io.BytesIO(to_png(diff_of("stem"))))
    assert 290e3 < image.size[0] * image.size[1] < 310e3


@needs_a_font
def test_any_name_can_be_drawn_in_pixels() -> None:
    assert to_png(diff_of("<script>alert('x')</script>", model=Hostile)).startswith(b"\x89PNG")


def test_without_resvg_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(DiffError, match=r"resvg-py is not installed\n  hint: pip install 'fxcollab\[png\]'"):
        to_png(diff_of("stem"))


def test_without_fonts_nothing_is_drawn_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    import resvg_py

    monkeypatch.setattr(resvg_py, "svg_to_bytes", partial(resvg_py.svg_to_bytes, skip_system_fonts=True))
    with pytest.raises(DiffError, match="there is no font for its text\n  hint: install one"):
        to_png(diff_of("stem"))


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour))
