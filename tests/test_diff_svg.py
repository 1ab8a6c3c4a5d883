"""The difference as a static picture, and the layout behind it and the page."""

from __future__ import annotations

import io
import sys
from functools import partial
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import DiffError
from fxcollab.diffs import png
from fxcollab.diffs.layout import Group, Layout, laid_out
from fxcollab.diffs.picture import Picture
from fxcollab.diffs.png import to_png
from fxcollab.diffs.scene import Scene
from fxcollab.diffs.svg import read, to_svg
from tests.fonts import needs_a_font
from tests.test_diff import Hostile, Net, diff_of

SVG = "{http://www.w3.org/2000/svg}"


class Skips(nn.Module):
    """A value of the trunk is read behind both splits, one of the first level behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.first, self.mid, self.second, self.up = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        a = self.first(skip)
        b = self.second(self.mid(a) + skip)
        return self.up(b + a) + skip


def skips() -> Scene:
    return diff_of("first", "second", model=Skips).scene()


def texts(drawn: str, kind: str | None = None) -> list[str | None]:
    found = ElementTree.fromstring(drawn).iter(f"{SVG}text")
    return [text.text for text in found if kind is None or text.attrib.get("class") == kind]


def chain(length: int) -> Scene:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(length)))
    return diff_of(str(length // 2), model=lambda: model).scene()


# The layout.


def test_the_first_lane_is_the_inference_graph_row_by_row() -> None:
    train_model = fxcollab.transform(Net(), splits=["stem", "body.1"], seed=0)
    scene = fxcollab.diff(train_model).scene()
    first = sorted((cell for cell in scene.drawing.cells if cell.lane == 0), key=lambda cell: cell.row)
    assert [scene.nodes[cell.node][0] for cell in first] == [
        node.name for node in fxcollab.prune(train_model).graph.nodes
    ]
    assert [cell.row for cell in first] == list(range(len(first)))


def test_clones_stand_on_the_row_of_their_origin_and_branches_in_the_lane_of_their_first_head() -> None:
    scene = diff_of("stem", "body.1").scene()
    cells = {scene.nodes[cell.node][0]: (cell.row, cell.lane) for cell in scene.drawing.cells}
    assert [cells[name][1] for name in ("head", "head_b0_1", "head_b1_0", "head_b1_1")] == [0, 1, 2, 3]
    assert len({cells[name][0] for name in ("head", "head_b0_1", "head_b1_0", "head_b1_1")}) == 1
    assert cells["body_0_b1"] == (cells["body_0"][0], 2)


def test_splits_are_rows_with_the_users_names() -> None:
    [splits] = diff_of("stem", "body.1").scene().drawing.splits
    assert splits == ((2, "split at stem", "level 1: 2 branches"), (4, "split at body.1", "level 2: 4 branches"))


def test_every_factor_of_a_value_has_one_label() -> None:
    picture = Picture(laid_out(skips()), 9, merged=False)
    marks = {
        picture.spots[spot][0].first: [mark for _, mark in ports]
        for spot, ports in picture.ports.items()
        if spot[1] == 0
    }
    half, quarter = "grad \N{MULTIPLICATION SIGN} 1/2", "grad \N{MULTIPLICATION SIGN} 1/4"
    assert sorted(marks["down"]) == [half, quarter]
    assert sorted(marks["first"]) == [half, quarter] and marks["second"] == [half]


def test_the_output_is_rewired_and_so_is_what_reads_a_rescale() -> None:
    diff = diff_of("stem", "body.1")
    assert [node.name for node in diff.nodes if node.rewired] == ["body_0", "body_2", "output"]
    assert {key.kind: key.count for key in diff.scene().legend}["rewired"] == 3


def test_ways_that_overlap_run_in_different_tracks() -> None:
    scene = skips()
    rows = {number: cell.row for number, cell in enumerate(scene.drawing.cells)}
    ways: dict[tuple[int, str], set[int]] = {}
    track_of: dict[tuple[int, str], int] = {}
    for wire, track in zip(scene.drawing.wires, laid_out(scene).tracks, strict=True):
        if track is not None:
            ways.setdefault((rows[wire.source], wire.mark), set()).update((rows[wire.source], rows[wire.target]))
            track_of[rows[wire.source], wire.mark] = track
    assert len(ways) == 3
    for one, here in ways.items():
        for other, there in ways.items():
            if one != other and track_of[one] == track_of[other]:
                assert max(here) <= min(there) or max(there) <= min(here)


def assert_nothing_is_crossed(picture: Picture) -> None:
    """No way runs under a node that is not at one of its ends."""
    for line in picture.lines():
        x = y = 0.0
        for step in _steps(line.path):
            nx, ny = step.get("x", x), step.get("y", y)
            for v, c in picture.spots.keys() - {line.source, line.target} if "start" not in step else ():
                left, top = picture.lefts[c], picture.tops[v]
                outside = (
                    max(x, nx) <= left or min(x, nx) >= left + 184 or max(y, ny) <= top or min(y, ny) >= top + 32
                )
                assert outside, (line, (v, c))
            x, y = nx, ny


def _steps(path: str) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    for part in path.replace("H", " H").replace("V", " V").split():
        if part[0] == "M":
            x, y = part[1:].split(",")
            steps.append({"x": float(x), "y": float(y), "start": True})
        else:
            steps.append({"x" if part[0] == "H" else "y": float(part[1:])})
    return steps


@pytest.mark.parametrize("merged", [False, True])
def test_no_way_runs_under_a_node(merged: bool) -> None:
    for depth in range(3):
        assert_nothing_is_crossed(Picture(laid_out(skips()), depth, merged))
        assert_nothing_is_crossed(Picture(laid_out(diff_of("stem", "body.1", fanouts=(3, 2)).scene()), depth, merged))


@pytest.mark.slow
@pytest.mark.parametrize("depth", range(7))
def test_no_way_runs_under_a_node_of_a_dense_network(depth: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.densenet121()
    splits = ["features.transition1", "features.transition2"]
    scene = fxcollab.diff(fxcollab.transform(model, splits=splits, granularity="op", seed=0)).scene()
    assert_nothing_is_crossed(Picture(laid_out(scene), depth, merged=depth % 2 == 0))


def test_equal_lanes_are_drawn_once_and_say_how_many_they_are() -> None:
    drawn = to_svg(fxcollab.diff(fxcollab.transform(Net(), "simple", ["stem"], heads=8, seed=0)).scene())
    assert "\N{MULTIPLICATION SIGN} 7 like head 0" in texts(drawn) and texts(drawn, "head") == [
        "head 0",
        "head 1 to 7",
    ]
    assert texts(drawn, "many") == ["\N{MULTIPLICATION SIGN}7"] * 3


def test_a_lane_that_another_pass_edited_stands_by_itself() -> None:
    train_model = fxcollab.transform(Net(), "simple", ["stem"], heads=8, seed=0)
    read = next(node for node in train_model.graph.nodes if node.name == "body_b2")
    with train_model.graph.inserting_after(read):
        train_model.graph.call_function(torch.relu, (read,))
    scene = fxcollab.diff(train_model).scene()
    assert [lane.merges for lane in scene.drawing.lanes] == [False, True, False, *[True] * 5]
    assert texts(to_svg(scene), "head") == ["head 0", "head 1 to 7", "head 2"]


def rows_of(layout: Layout, depth: int) -> int:
    return len(layout.visible(depth))


@pytest.mark.parametrize("length", [5, 60, 300, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_flat_graph_folds_until_it_can_be_read_and_opens_step_by_step(length: int) -> None:
    layout = laid_out(chain(length))
    assert rows_of(layout, 0) <= 7 and rows_of(layout, 99) == length + 2
    assert all(len(group.children) <= 12 and group.start < group.stop for group in _all(layout.groups))
    assert rows_of(layout, layout.depth_for(34)) <= 34


def _all(groups: tuple[Group, ...]) -> list[Group]:
    return [found for group in groups for found in (group, *_all(group.children))]


class CalledTwice(nn.Module):
    """Its block is run before and after the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.act, self.head = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.block(self.act(self.block(x))) * 2)
        return result


def test_modules_fold_alike_in_all_heads_and_each_call_by_itself() -> None:
    layout = laid_out(diff_of("mul", model=CalledTwice, granularity="op").scene())
    assert [group.title for group in _all(layout.groups)].count("block") == 2


# The picture.


def test_the_picture_has_a_title_a_legend_and_all_heads() -> None:
    drawn = to_svg(diff_of("stem", "body.1").scene())
    assert texts(drawn, "name") == ["Net: training graph, 4 heads"]
    assert any("6 nodes, untouched; 66 to 176 parameters" in str(text) for text in texts(drawn, "note"))
    assert "+ another head's instance: 8" in texts(drawn, "key")
    assert (
        texts(drawn, "head") == ["head 0", "head 1", "head 2", "head 3"] and texts(drawn, "first").count("head") == 4
    )


@needs_a_font
def test_the_picture_is_the_same_twice() -> None:
    assert to_svg(diff_of("stem").scene()) == to_svg(diff_of("stem").scene())
    assert to_png(diff_of("stem").scene()) == to_png(diff_of("stem").scene())


def test_hostile_names_are_text_in_the_picture() -> None:
    drawn = to_svg(diff_of("<script>alert('x')</script>", model=Hostile).scene())
    assert "<script" not in drawn
    ElementTree.fromstring(drawn)


def test_independent_instances_stand_side_by_side() -> None:
    drawn = to_svg(fxcollab.diff(fxcollab.transform(Net(), "multi-instance", heads=3, seed=0)).scene())
    assert texts(drawn, "head") == ["head 0", "head 1", "head 2"] and "heads begin" in texts(drawn, "cut")


# Two graphs.


def edited() -> fxcollab.CollabGraphModule:
    after = fxcollab.capture(Net(), ["stem"])
    stem = next(node for node in after.graph.nodes if node.name == "stem")
    with after.graph.inserting_after(stem):
        new = after.graph.call_function(torch.tanh, (stem,))
        stem.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    after.recompile()
    return after


def test_what_was_matched_stands_on_one_row_on_both_sides() -> None:
    scene = fxcollab.diff(fxcollab.capture(Net(), ["stem"]), edited()).scene()
    rows: dict[str, list[tuple[int, int]]] = {}
    for cell in scene.drawing.cells:
        rows.setdefault(scene.nodes[cell.node][0], []).append((cell.row, cell.lane))
    assert rows["tanh"] == [(2, 1)] and rows["body"] == [(3, 0), (3, 1)] and rows["stem"] == [(1, 0), (1, 1)]
    assert "1 added, 0 changed, 1 rewired" in to_svg(scene)


def test_training_graphs_of_other_trees_have_their_lanes_side_by_side() -> None:
    a, b = (fxcollab.transform(Net(), splits=splits, seed=0) for splits in (["stem"], ["stem", "body.1"]))
    scene = fxcollab.diff(a, b).scene()
    assert [lane.side for lane in scene.drawing.lanes] == [0, 0, 1, 1, 1, 1]
    cells = [(cell.row, cell.lane) for cell in scene.drawing.cells]
    assert len(set(cells)) == len(cells)
    assert_nothing_is_crossed(Picture(laid_out(scene), 9, merged=False))
    assert_nothing_is_crossed(Picture(laid_out(scene), 0, merged=True))


def test_a_graph_in_which_the_order_turned_round_is_drawn() -> None:
    def graph(turned: bool) -> fx.GraphModule:
        made = fx.Graph()
        value = made.placeholder("x")
        for function in (torch.tanh, torch.sin)[:: -1 if turned else 1]:
            value = made.create_node("call_function", function, (value,), name=function.__name__)
        made.output(value)
        return fx.GraphModule(nn.Module(), made)

    assert texts(to_svg(fxcollab.diff(graph(False), graph(True)).scene()), "first").count("tanh") == 2


# In pixels.


@needs_a_font
def test_the_picture_in_pixels_has_the_size_and_the_colours_of_the_page() -> None:
    diff = diff_of("stem", "body.1")
    root = ElementTree.fromstring(to_svg(diff.scene()))
    image = Image.open(io.BytesIO(to_png(diff.scene())))
    assert image.size == tuple(2 * int(float(root.attrib[side])) for side in ("width", "height"))
    seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or ()}
    page = read("drawing.css").partition("}")[0]
    expected = ("page", "text", "shared", "own", "cloned", "mark", "mark-line")
    assert {_rgb(page.partition(f"--{name}: #")[2][:6]) for name in expected} <= seen


@needs_a_font
def test_a_huge_picture_in_pixels_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "_SCALE", 1000.0)
    monkeypatch.setattr(png, "_MOST_PIXELS", 300_000)
    image = Image.open(io.BytesIO(to_png(diff_of("stem").scene())))
    assert 290e3 < image.size[0] * image.size[1] < 310e3


@needs_a_font
def test_any_name_can_be_drawn_in_pixels() -> None:
    assert to_png(diff_of("<script>alert('x')</script>", model=Hostile).scene()).startswith(b"\x89PNG")


def test_without_resvg_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(DiffError, match=r"resvg-py is not installed\n  hint: pip install 'fxcollab\[png\]'"):
        to_png(diff_of("stem").scene())


def test_without_fonts_nothing_is_drawn_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    import resvg_py

    monkeypatch.setattr(resvg_py, "svg_to_bytes", partial(resvg_py.svg_to_bytes, skip_system_fonts=True))
    with pytest.raises(DiffError, match="there is no font for its text\n  hint: install one"):
        to_png(diff_of("stem").scene())


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour))
