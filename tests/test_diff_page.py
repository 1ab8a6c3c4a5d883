"""The page of the difference, in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxcollab
from fxcollab.diffs.html import to_html
from fxcollab.diffs.notebook import framed
from tests.test_diff import Auxiliary, Hostile, Net

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (on Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


Show = Callable[..., Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Show]:
    """Opens the page of a difference; it may ask the network for nothing and complain of nothing."""
    complaints: list[str] = []
    pages: list[Any] = []

    def opened(diff: fxcollab.Diff, hash: str = "", report: Any = None, **options: Any) -> Any:
        file = tmp_path / "diff.html"
        diff.to_html(file, report)
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 860}, **options})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto(f"file://{file}{hash}")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert complaints == []


LARGE = {"width": 2560, "height": 2000}
"""A window in which nothing needs to be folded."""


def small() -> fxcollab.Diff:
    return fxcollab.diff(fxcollab.transform(Net(), splits=["stem", "body.1"], seed=0))


def resnet50(granularity: Any = "auto") -> fxcollab.Diff:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    return fxcollab.diff(fxcollab.transform(model, splits=["layer2", "layer3"], granularity=granularity, seed=0))


def boxes(page: Any) -> dict[str, Any]:
    """Where everything stands."""
    return dict(
        page.evaluate("""() => [...document.querySelectorAll('#world [data-id]')].map((e) => {
            const r = e.querySelector('rect');
            return [e.dataset.id, ['x', 'y', 'width', 'height'].map((key) => Number(r.getAttribute(key)))];
        })""")
    )


def opacity(page: Any, name: str) -> float:
    return float(page.evaluate(f"getComputedStyle(document.querySelector('[data-id=\"node:{name}\"]')).opacity"))


def node(page: Any, name: str) -> Any:
    return page.locator(f'#drawing [data-id="node:{name}"]')


def test_every_node_stands_in_its_branch_and_heads_from_left_to_right(show: Show) -> None:
    page = show(small())
    found = boxes(page)
    assert {f"node:{n.name}" for n in small().nodes} <= set(found)
    for name, branch in (("node:head_b0_1", "b0_1"), ("b0_1", "b0"), ("node:body_0_b1", "b1")):
        (x, y, width, height), (left, top, wide, high) = found[name], found[branch]
        assert left <= x and top <= y and x + width <= left + wide and y + height <= top + high
    assert [found[branch][0] for branch in ("b0_0", "b0_1", "b1_0", "b1_1")] == sorted(
        found[branch][0] for branch in ("b0_0", "b0_1", "b1_0", "b1_1")
    )


@pytest.mark.slow
def test_nothing_overlaps(show: Show) -> None:
    found = {name: box for name, box in boxes(show(resnet50())).items() if name.startswith("node:")}
    names = list(found)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            (x, y, w, h), (a, b, c, d) = found[one], found[other]
            assert x + w <= a or a + c <= x or y + h <= b or b + d <= y, (one, other)


@pytest.mark.slow
def test_the_spotlight_dims_and_moves_nothing(show: Show) -> None:
    page = show(small())
    before = boxes(page)
    page.click("#spot-inference")
    assert opacity(page, "head_b0_1") < 0.2 and opacity(page, "rescale") < 0.2 and opacity(page, "head") == 1
    page.click("#spot-training")
    assert opacity(page, "head_b0_1") == 1 and opacity(page, "stem") < 0.5
    page.click("#spot-both")
    assert opacity(page, "stem") == 1 == opacity(page, "head_b0_1")
    assert boxes(page) == before


@pytest.mark.slow
def test_inference_is_drawn_without_what_was_inserted(show: Show) -> None:
    page = show(small(), "#spot=inference")
    edge = page.locator('#world .edge.direct[data-from="node:stem"][data-to="node:body_0"]')
    assert edge.evaluate("(e) => getComputedStyle(e).visibility") == "visible"
    page.click("#spot-both")
    assert edge.evaluate("(e) => getComputedStyle(e).visibility") == "hidden"


@pytest.mark.slow
def test_the_passes_go_from_the_captured_to_the_pruned_graph(show: Show) -> None:
    page = show(small())

    def at(place: int) -> tuple[str, str, float]:
        page.locator("#pass").fill(str(place))
        clone = node(page, "head_b1_1")
        return (
            page.inner_text("#pass-name"),
            clone.evaluate("(e) => getComputedStyle(e).visibility"),
            opacity(page, "head_b1_1"),
        )

    assert at(0)[:2] == ("captured", "hidden")
    assert at(1)[:2] == ("split", "hidden")
    assert at(2) == ("rewritten", "visible", 1)
    assert at(3)[0] == "pruned" and at(3)[2] < 0.1


@pytest.mark.slow
def test_selecting_a_clone_tells_what_became_of_it(show: Show) -> None:
    page = show(small())
    node(page, "head_b1_0").click()
    told = page.inner_text("#details")
    assert "+ another head's instance" in told and "b1_0, head 2" in told and "4 instances" in told
    assert page.locator("#world .twin").count() == 4
    node(page, "rescale").click()
    assert "times 1/2 on its way back to stem" in page.inner_text("#details")
    assert "nothing: it is gone, and its readers read stem" in page.inner_text("#details")


@pytest.mark.slow
def test_pointing_at_a_node_lights_up_all_of_its_clones(show: Show) -> None:
    page = show(small())
    node(page, "body_2_b0_1").hover()
    lit = page.locator("#world .twin").evaluate_all("(all) => all.map((e) => e.dataset.id)")
    assert set(lit) == {"node:body_2", "node:body_2_b0_1", "node:body_2_b1_0", "node:body_2_b1_1"}
    assert page.locator("#world .stack").first.inner_html() == "\u00d72"


@pytest.mark.slow
def test_boxes_open_and_close_by_pointer_and_keyboard(show: Show) -> None:
    page = show(resnet50("op"), viewport=LARGE)
    closed = page.locator('#world .closed[data-id="|layer1.0"]')
    assert "nodes" in closed.inner_html()
    closed.click()
    assert node(page, "layer1_0_conv3").count() == 1
    opened = page.locator('#world .box[data-id="|layer1.0"]')
    opened.focus()
    page.keyboard.press("Enter")
    assert page.locator('#world .closed[data-id="|layer1.0"]').count() == 1
    assert page.evaluate("document.activeElement.dataset.id") == "|layer1.0"


@pytest.mark.slow
def test_a_closed_box_says_what_changed_inside(show: Show) -> None:
    page = show(resnet50("op"))
    assert "+32" in page.locator('#world .closed[data-id="b1_0|layer4"] .glyph').inner_html()


@pytest.mark.slow
def test_searching_finds_and_shows_what_is_inside_of_closed_boxes(show: Show) -> None:
    page = show(resnet50("op"))
    page.keyboard.press("/")
    page.keyboard.type("layer3.2.conv3")
    assert page.inner_text("#found") == "2 found"
    page.keyboard.press("Enter")
    assert page.inner_text("#found") == "1 of 2"
    assert page.locator("#world .node.selected").count() == 1


@pytest.mark.slow
def test_changes_are_visited_one_by_one(show: Show) -> None:
    page = show(small())
    visited = []
    for _ in range(3):
        page.keyboard.press("n")
        visited.append(page.locator("#world .selected").get_attribute("data-id"))
    assert visited == [f"node:{node.name}" for node in small().nodes if not node.in_inference][:3]
    page.keyboard.press("p")
    assert page.locator("#world .selected").get_attribute("data-id") == visited[1]


@pytest.mark.slow
def test_the_address_holds_the_view(show: Show) -> None:
    page = show(resnet50("op"), viewport=LARGE)
    page.locator('#world .closed[data-id="|layer1.0"]').click()
    page.click("#spot-inference")
    address = page.evaluate("location.hash")
    again = show(resnet50("op"), address, viewport=LARGE)
    assert again.locator('#world .box[data-id="|layer1.0"]').count() == 1
    assert again.get_attribute("#spot-inference", "aria-pressed") == "true"


@pytest.mark.slow
def test_zooming_and_panning_move_the_view_alone(show: Show) -> None:
    page = show(small())
    before, view = boxes(page), page.get_attribute("#world", "transform")
    page.keyboard.press("+")
    zoomed = page.get_attribute("#world", "transform")
    page.mouse.move(200, 400)
    page.mouse.wheel(0, 300)
    page.mouse.down()
    page.mouse.move(260, 440)
    page.mouse.up()
    assert len({view, zoomed, page.get_attribute("#world", "transform")}) == 3
    page.keyboard.press("0")
    assert page.get_attribute("#world", "transform") == view
    assert boxes(page) == before


@pytest.mark.slow
def test_the_minimap_shows_where_one_is(show: Show) -> None:
    page = show(small())
    assert not page.locator("#minimap").is_visible()  # all is in view
    for _ in range(8):
        page.keyboard.press("+")
    assert page.locator("#minimap").is_visible() and page.locator("#viewport").count() == 1


@pytest.mark.slow
def test_the_table_holds_every_node_for_those_who_cannot_see_the_drawing(show: Show) -> None:
    page = show(small())
    page.keyboard.press("t")
    rows = page.locator("#rows tr")
    assert rows.count() == len(small().nodes)
    assert page.locator('#rows tr[data-name="head_b1_1"]').inner_text().split("\t")[:2] == ["head_b1_1", "+"]
    labels = page.locator("#world [tabindex]").evaluate_all("(all) => all.map((e) => e.getAttribute('aria-label'))")
    assert all(labels) and "head_b1_1: another head's instance" in labels


@pytest.mark.slow
def test_the_proof_is_a_badge(show: Show) -> None:
    model = Net()
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    report = fxcollab.verify(model, train_model, (torch.randn(2, 3),))
    page = show(fxcollab.diff(train_model), report=report)
    assert page.inner_text("#proof") == f"proved: all {len(report.checks)} checks hold"
    assert page.get_attribute("#proof", "class") == "proved"
    assert "not proved here" in show(small()).inner_text("#proof")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(show: Show, scheme: Any) -> None:
    page = show(small(), color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    assert (before == "rgb(255, 255, 255)") == (scheme == "light")
    page.click("#theme")
    assert page.evaluate(background) != before


@pytest.mark.slow
def test_the_drawing_can_be_taken_away(show: Show, tmp_path: Path) -> None:
    page = show(small())
    for button, name, start in (("#save-svg", "diff.svg", b"<svg"), ("#save-png", "diff.png", b"\x89PNG")):
        with page.expect_download() as download:
            page.click(button)
        target = tmp_path / name
        download.value.save_as(target)
        assert download.value.suggested_filename == name and target.read_bytes().startswith(start)
    assert "<script" not in (tmp_path / "diff.svg").read_text()


@pytest.mark.slow
def test_a_narrow_screen_is_enough(show: Show) -> None:
    page = show(resnet50(), viewport={"width": 390, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#drawing").bounding_box()["height"] > 300


def test_hostile_names_are_text(show: Show) -> None:
    class More(Hostile):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("</script><img src=x onerror=alert(1)>@DATA@" + "n" * 300, nn.Linear(3, 3))

    page = show(fxcollab.diff(fxcollab.transform(More(), splits=["<script>alert('x')</script>"], seed=0)))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    assert page.locator("#world .node").count() > 3 and page.locator("img").count() == 0
    page.keyboard.press("t")
    assert "<script>alert('x')</script>" in page.inner_text("header")


def chain() -> fxcollab.Diff:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    return fxcollab.diff(fxcollab.transform(model, splits=["3"], seed=0))


@pytest.mark.slow
def test_what_is_unchanged_can_be_folded(show: Show) -> None:
    page = show(chain())
    assert page.get_attribute("#fold", "aria-pressed") == "false" and node(page, "_1").count() == 1
    page.keyboard.press("f")
    run = page.locator("#world .closed.run")
    assert run.count() == 1 and "_0 … _3" in run.inner_html() and "4 unchanged" in run.inner_html()
    assert node(page, "_1").count() == 0 and node(page, "rescale").count() == 1 and node(page, "_4_b1").count() == 1
    run.click()
    assert node(page, "_1").count() == 1 and page.locator("#world .box.run").count() == 1
    page.click("#fold")
    assert page.locator("#world .run").count() == 0


@pytest.mark.slow
def test_the_address_holds_what_is_folded_and_opened_in_it(show: Show) -> None:
    page = show(chain())
    page.click("#fold")
    page.locator("#world .closed.run").click()
    again = show(chain(), page.evaluate("location.hash"))
    assert again.locator("#world .box.run").count() == 1 and node(again, "_1").count() == 1


@pytest.mark.slow
def test_a_flat_graph_opens_folded(show: Show) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(60)))
    page = show(fxcollab.diff(fxcollab.transform(model, splits=["50"], seed=0)))
    assert page.get_attribute("#fold", "aria-pressed") == "true"
    assert page.locator("#world .closed.run").count() == 2  # the trunk, and head 0's branch


@pytest.mark.slow
def test_while_nothing_is_selected_the_head_tree_is_shown(show: Show) -> None:
    page = show(small())
    told = page.inner_text("#details")
    assert "trunk: all heads" in told and "b1_0: head 2" in told and "% of FLOPs" in told
    assert page.locator("#details .heads li").count() == 1 + 2 + 4
    view = page.get_attribute("#world", "transform")
    page.get_by_role("button", name="b1_1: head 3", exact=True).click()
    assert page.get_attribute("#world", "transform") != view
    page.click("#fit")
    node(page, "stem").click()
    assert "Head tree" not in page.inner_text("#details")
    page.keyboard.press("Escape")
    assert "Head tree" in page.inner_text("#details")


@pytest.mark.slow
def test_a_node_says_what_it_reads_before_and_after(show: Show) -> None:
    page = show(small(), "#node=body_0")
    told = page.inner_text("#details")
    assert "reads, in the training graph\nrescale\n" in told and "reads, in the inference graph\nstem\n" in told


@pytest.mark.slow
def test_no_name_runs_into_what_changed_inside_of_a_closed_box(show: Show) -> None:
    page = show(resnet50("op"))
    overlap = page.evaluate("""() => [...document.querySelectorAll('#world .closed')].filter((box) => {
        const [first, glyph] = ['.first', '.glyph'].map((part) => box.querySelector(part).getBBox());
        return glyph.width && glyph.x + glyph.width > first.x;
    }).length""")
    assert page.locator("#world .closed .glyph").count() > 3 and overlap == 0


@pytest.mark.slow
def test_a_notebooks_frame_is_the_same_page(show: Show, tmp_path: Path) -> None:
    page = show(small())
    page.set_content(framed(to_html(small())))
    page.locator("summary").click()
    frame = page.frame_locator("iframe")
    frame.locator('[data-id="node:head_b1_0"]').click()
    assert "b1_0, head 2" in frame.locator("#details").inner_text()


@pytest.mark.slow
def test_an_address_is_all_there_is_to_the_view(show: Show) -> None:
    page = show(small(), "#spot=inference&node=stem&open=100%25")  # a box that isn't there
    assert page.locator("#world .node").count() > 3
    page.evaluate("location.hash = '#pass=split'")
    page.wait_for_function("document.body.dataset.pass === 'split'")
    assert page.get_attribute("body", "data-spot") == "both" and page.locator("#world .selected").count() == 0
    closed = show(small(), "#node=head_b1_1&closed=b1_1")
    assert node(closed, "head_b1_1").count() == 0 and "head 3" in closed.inner_text("#details")


@pytest.mark.slow
def test_two_fingers_zoom(show: Show) -> None:
    page = show(small(), viewport={"width": 390, "height": 780}, has_touch=True)
    before = page.evaluate("state.view.k")
    page.evaluate("""() => {
        const finger = (type, pointerId, clientX) => document.getElementById("drawing").dispatchEvent(
            new PointerEvent(type, { pointerId, clientX, clientY: 400, bubbles: true, button: 0 }));
        finger("pointerdown", 1, 150); finger("pointerdown", 2, 200); finger("pointermove", 2, 250);
        finger("pointerup", 1, 150); finger("pointerup", 2, 250);
    }""")
    assert page.evaluate("state.view.k") == pytest.approx(2 * before)
    page.click("#farther")
    assert page.evaluate("state.view.k") == pytest.approx(1.6 * before)


@pytest.mark.slow
def test_the_keyboard_moves_what_it_is_in(show: Show) -> None:
    page = show(small())
    for _ in range(6):
        page.keyboard.press("+")
    page.locator('#world [data-id="node:output"]').focus()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("inView(itemAt(document.activeElement).box)")
    page.keyboard.press("t")
    page.locator("#table").focus()
    view = page.get_attribute("#world", "transform")
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#world", "transform") == view


@pytest.mark.slow
def test_links_keep_the_focus_and_selection_is_told(show: Show) -> None:
    page = show(small(), "#node=head_b1_0")
    page.locator("#details button", has_text="body_2_b1_0").click()
    assert page.evaluate("document.activeElement.tagName") == "H2"
    assert page.locator("#world [aria-current]").count() == 1


@pytest.mark.slow
def test_what_a_downloaded_picture_shows_is_what_was_seen(show: Show, tmp_path: Path) -> None:
    page = show(small(), "#spot=inference")
    with page.expect_download() as download:
        page.click("#save-svg")
    download.value.save_as(tmp_path / "seen.svg")
    page.goto(f"file://{tmp_path / 'seen.svg'}")
    faded = "getComputedStyle(document.querySelector('[data-id=\"node:head_b0_1\"]')).opacity"
    assert float(page.evaluate(faded)) < 0.2


@pytest.mark.slow
def test_a_change_is_never_visited_where_it_can_not_be_seen(show: Show) -> None:
    page = show(small(), "#pass=captured")
    page.keyboard.press("n")
    assert node(page, "rescale").evaluate("(e) => getComputedStyle(e).visibility") == "visible"


@pytest.mark.slow
def test_pointing_at_a_closed_box_lights_up_its_clones(show: Show) -> None:
    page = show(resnet50("op"), viewport=LARGE)
    page.locator('#world .closed[data-id="b1_0|layer4"]').hover()
    lit = page.locator("#world .twin").evaluate_all("(all) => all.map((e) => e.dataset.id)")
    assert {"b0_1|layer4", "b1_0|layer4", "b1_1|layer4"} <= set(lit)


class Tied(nn.Module):
    """A layer of the trunk is used behind the split as well, inside of a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.body = nn.Sequential(self.first, nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(self.first(x))
        return result


@pytest.mark.slow
def test_a_parameter_that_is_handed_in_is_explained_and_counted_once(show: Show) -> None:
    diff = fxcollab.diff(fxcollab.transform(Tied(), splits=["first"], seed=0))
    assert sum(n.new_parameters for n in diff.nodes) == 3 * 20
    page = show(diff)
    assert "state" in page.inner_text("header") and page.locator("footer [data-change=state]").is_visible()
    handed = next(n.name for n in diff.nodes if n.change == "state")
    page.evaluate(f"select('{handed}')")
    assert "the module has this parameter itself" in page.inner_text("#details")
    page.evaluate("select('output')")
    assert "reads, in the inference graph\nbody_2\n" in page.inner_text("#details") + "\n"


@pytest.mark.slow
def test_the_page_says_of_which_mode_it_is_and_what_is_unknown(show: Show) -> None:
    train_model = fxcollab.transform(Auxiliary(), splits=["body"], seed=0)
    page = show(fxcollab.diff(train_model, training=False))
    assert "eval mode" in page.inner_text("header") and "only train mode's graph is counted" in page.inner_text(
        "aside"
    )


# The file.


@pytest.mark.slow
def test_the_file_is_small_and_the_same_twice() -> None:
    one, other = (to_html(resnet50()) for _ in range(2))
    assert one == other and len(one.encode()) <= 400_000


def test_the_file_asks_for_nothing_and_carries_the_layouts_licence() -> None:
    page = to_html(small())
    assert "sourceMappingURL" not in page and "Chris Pettitt" in page
    start = page.index('id="data">') + len('id="data">')
    assert json.loads(page[start : page.index("</script>", start)])["heads"] == 4
