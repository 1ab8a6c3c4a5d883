"""The page of the difference, in a real browser."""

from __future__ import annotations

import json
import os
import re
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
from fxcollab.diffs.layout import laid_out
from fxcollab.diffs.notebook import framed
from fxcollab.diffs.picture import Picture
from tests.page_faults import faults, measured
from tests.test_diff import Auxiliary, Hostile, Net
from tests.test_diff_svg import Skips, edited

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

    def opened(diff: Any, hash: str = "", **options: Any) -> Any:
        file = tmp_path / "diff.html"
        diff.to_html(file)
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


def small() -> fxcollab.Diff:
    return fxcollab.diff(fxcollab.transform(Net(), splits=["stem", "body.1"], seed=0))


def resnet(**options: Any) -> fxcollab.Diff:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    return fxcollab.diff(fxcollab.transform(model, splits=["layer2", "layer3"], seed=0, **options))


def long_chain() -> fxcollab.Diff:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(300)))
    return fxcollab.diff(fxcollab.transform(model, splits=["99"], seed=0))


def pair() -> Any:
    return fxcollab.diff(fxcollab.capture(Net(), ["stem"]), edited())


def cell(page: Any, name: str, lane: int = 0) -> Any:
    """The drawn cell of a node, by what is written in it and the number of its column."""
    return page.locator(f'#world .node[data-at$=",{lane}"]').filter(has=page.locator(f'text.first:text-is("{name}")'))


def opacity(page: Any, name: str, lane: int) -> float:
    return float(cell(page, name, lane).evaluate("(made) => getComputedStyle(made).opacity"))


SIZES = [(1440, 900), (1280, 860), (768, 1024), (390, 844)]


def test_a_page_opens_whole_readable_and_uncrossed(show: Show) -> None:
    page = show(small())
    assert faults(page) == {} and measured(page)["lanes"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: fxcollab.diff(fxcollab.transform(Skips(), splits=["first", "second"], seed=0)),
        lambda: resnet(fanouts=(4, 2)),
        lambda: resnet(granularity="op"),
        lambda: fxcollab.diff(fxcollab.transform(Net(), "ladder", ["stem", "body.1"], seed=0)),
        lambda: fxcollab.diff(fxcollab.transform(Net(), "multi-instance", heads=3, seed=0)),
        lambda: fxcollab.diff(
            fxcollab.transform(nn.Sequential(*(nn.Linear(3, 3) for _ in range(300))), splits=["99"], seed=0)
        ),
        pair,
    ],
    ids=["skips", "fanouts", "operations", "ladder", "instances", "chain", "two"],
)
def test_a_first_view_is_right_in_every_size_and_scheme(show: Show, make: Callable[[], Any]) -> None:
    diff = make()
    for number, (width, height) in enumerate(SIZES):
        scheme = ("light", "dark")[number % 2]
        page = show(diff, viewport={"width": width, "height": height}, color_scheme=scheme)
        assert faults(page) == {}, (width, measured(page))
        page.set_viewport_size({"width": 700, "height": 700})
        page.wait_for_timeout(150)
        assert faults(page) == {}, ("resized", measured(page))


DRAWN = """([depth, merged]) => {
    Object.assign(state, { open: opened(depth), merged, narrow: false, spot: "both" });
    redraw();
    return [...plan.wires.values()].map(({ drawn }) => [drawn.classList[1], drawn.firstChild.getAttribute("d")]);
}"""


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: resnet(granularity="op", fanouts=(3, 2)), pair], ids=["operations", "two"])
def test_page_and_picture_draw_the_same_lines(show: Show, make: Callable[[], Any]) -> None:
    def line(kind: str, path: str) -> tuple[str, list[float]]:
        return kind, [round(float(number), 1) for number in re.findall(r"-?\d+\.?\d*", path)]

    diff = make()
    page, layout = show(diff), laid_out(diff.scene())
    for depth, merged in ((0, True), (1, False), (2, True), (9, False)):
        picture = Picture(layout, depth, merged)
        assert sorted(line(*drawn) for drawn in page.evaluate(DRAWN, [depth, merged])) == sorted(
            line(drawn.kind, drawn.path) for drawn in picture.lines()
        )


@pytest.mark.slow
def test_what_is_open_is_uncrossed_too(show: Show) -> None:
    page = show(resnet(granularity="op"))
    page.click("#open-all")
    found = faults(page)
    assert found.pop("outside of the first view") > 1000 and found == {} and measured(page)["rows"] > 70
    page.click("#close-all")
    assert measured(page)["rows"] < 10


@pytest.mark.slow
def test_heads_that_are_alike_are_drawn_once_where_there_is_no_room(show: Show) -> None:
    page = show(resnet(), viewport={"width": 390, "height": 844})
    assert measured(page)["lanes"] == 2 and "\N{MULTIPLICATION SIGN} 3 like head 0" in page.inner_html("#world")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#heads")
    assert measured(page)["lanes"] == 4 and page.get_attribute("#heads", "aria-pressed") == "true"


@pytest.mark.slow
def test_the_spotlight_dims_and_moves_nothing(show: Show) -> None:
    page = show(small())
    before = page.evaluate("[...plan.spots.values()].map(({ drawn }) => drawn.getBBox().y)")
    page.click("#spots >> text=inference")
    assert opacity(page, "head", 1) < 0.2 and opacity(page, "head", 0) == 1
    page.click("#spots >> text=training")
    assert opacity(page, "head", 1) == 1 and opacity(page, "stem", 0) < 0.2
    assert page.evaluate("[...plan.spots.values()].map(({ drawn }) => drawn.getBBox().y)") == before


@pytest.mark.slow
def test_the_legend_counts_and_filters(show: Show) -> None:
    page = show(small())
    key = page.get_by_role("button", name="+ another head's instance: 8")
    key.click()
    assert key.get_attribute("aria-pressed") == "true" and opacity(page, "head", 1) < 0.2
    page.keyboard.press("t")
    assert page.locator("#table tbody tr").count() == len(small().nodes) - 8
    key.click()
    assert page.locator("#table tbody tr").count() == len(small().nodes)


@pytest.mark.slow
def test_selecting_a_clone_tells_what_became_of_it(show: Show) -> None:
    page = show(small())
    cell(page, "head", 2).click()
    told = page.inner_text("#details")
    assert "head_b1_0" in told and "+ another head's instance" in told and "b1_0" in told
    assert page.locator("#world .twin").count() == 4 and page.locator("#world .edge.touched").count() >= 1
    page.locator("#world .mark").first.click()
    assert "\N{MULTIPLICATION SIGN} 0.5 on its way back" in page.inner_text("#details")
    page.keyboard.press("Escape")
    assert "head tree" in page.inner_text("#details")


@pytest.mark.slow
def test_modules_open_by_their_title_by_double_click_and_by_keyboard(show: Show) -> None:
    page = show(resnet(granularity="op"))
    rows = measured(page)["rows"]
    page.locator("#world .closed .first").first.click()
    opened = measured(page)["rows"]
    assert opened > rows
    page.locator("#world .fold[data-close]").last.press("Enter")
    page.locator("#world .closed rect").last.dblclick(position={"x": 150, "y": 26})
    assert measured(page)["rows"] > rows - 8
    closed = page.locator("#world .closed").first
    closed.focus()
    before = measured(page)["rows"]
    page.keyboard.press("Enter")
    assert measured(page)["rows"] > before


@pytest.mark.slow
def test_arrows_follow_edges_and_names_tell_factors(show: Show) -> None:
    page = show(small())
    page.locator('#world .node[tabindex="0"]').focus()
    names = []
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert [name.split(" ")[0] for name in names] == ["stem", "0", "0", "stem"]
    assert "grad \N{MULTIPLICATION SIGN} 1/2" in names[0] and "another head's instance" in names[2]


@pytest.mark.slow
def test_shortcuts_can_be_switched_off_and_the_theme_is_remembered(show: Show) -> None:
    page = show(small())
    page.click("text=keys")
    page.uncheck("#keys")
    page.locator("body").press("t")
    assert page.locator("#table").is_hidden()
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.click("#theme")
    page.reload()
    assert page.evaluate(background) != before and not page.is_checked("#keys")


@pytest.mark.slow
def test_searching_lights_and_lists_hits(show: Show) -> None:
    page = show(resnet(granularity="op"))
    page.keyboard.press("/")
    page.keyboard.type("layer3.1.conv2")
    assert page.inner_text("#said") == "2 found" and "2 found" in page.inner_text("#details")
    assert page.locator("#world .hit").count() >= 2
    page.keyboard.press("Enter")
    assert page.inner_text("#said") == "1 of 2" and page.locator("#world .selected").count() == 1


@pytest.mark.slow
def test_changes_are_visited_hunk_by_hunk(show: Show) -> None:
    page = show(pair())
    page.keyboard.press("n")
    assert page.inner_text("#hunk") == "1 of 1" and "tanh" in page.inner_text("#details")
    page = show(small(), "#spot=inference")
    for number in (1, 2, 3):
        page.click("#next")
        assert page.inner_text("#hunk").startswith(f"{number} of ")
    assert page.get_attribute("body", "data-spot") == "both"


@pytest.mark.slow
def test_one_of_two_graphs_can_be_seen_alone_on_the_same_rows(show: Show) -> None:
    page = show(pair())
    both = page.evaluate("plan.rows.length")
    page.click("#spots >> text=a")
    assert measured(page)["lanes"] == 1 and page.evaluate("plan.rows.length") == both
    page.keyboard.press("n")
    assert "tanh" in page.inner_text("#details") and page.get_attribute("body", "data-spot") == "b"


@pytest.mark.slow
def test_the_table_is_virtual_sorts_and_selects(show: Show) -> None:
    diff = long_chain()
    page = show(diff, "#table=1")
    assert page.locator("#table tbody tr").count() < 80
    assert page.get_attribute("table", "aria-rowcount") == str(len(diff.nodes) + 1)
    page.click("th >> text=node")
    page.click("th >> text=node")
    assert page.locator("#table tbody th").first.inner_text() == "rescale"
    page.click("#table tbody th button >> nth=0")
    assert "rescale" in page.inner_text("#details")


@pytest.mark.slow
def test_the_proof_is_a_badge_with_its_list(show: Show) -> None:
    model = Net()
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    report = fxcollab.verify(model, train_model, (torch.randn(2, 3),))

    class Proved:
        def to_html(self, path: Path) -> None:
            fxcollab.diff(train_model).to_html(path, report)

    page = show(Proved())
    assert page.inner_text("#proof summary") == f"proved: all {len(report.checks)} checks hold"
    page.click("#proof summary")
    assert page.locator("#proof li").count() == len(report.checks)
    assert show(small()).locator("#proof").is_hidden()


@pytest.mark.slow
def test_cells_can_be_coloured_by_what_they_cost(show: Show) -> None:
    page = show(resnet())
    drawn = "[...plan.spots.values()].find(({ cells }) => cells[0][4] === 'layer4').drawn.firstChild"
    fill = f"getComputedStyle({drawn}).fill"
    before = page.evaluate(fill)
    page.select_option("#colour", "parameters")
    assert page.evaluate(fill) != before


@pytest.mark.slow
def test_zooming_hides_what_would_be_too_small(show: Show) -> None:
    page = show(small())
    for _ in range(3):
        page.keyboard.press("-")
    assert measured(page)["smallest text"] >= 10 and not page.locator("#world .first").first.is_visible()
    page.keyboard.press("0")
    assert page.locator("#world .first").first.is_visible()


@pytest.mark.slow
def test_the_address_is_all_there_is_to_the_view(show: Show) -> None:
    page = show(resnet(granularity="op"))
    page.locator("#world .closed .first").first.click()
    page.click("#spots >> text=inference")
    address, rows = page.evaluate("location.hash"), measured(page)["rows"]
    again = show(resnet(granularity="op"), address)
    assert measured(again)["rows"] == rows and again.get_attribute("body", "data-spot") == "inference"
    strange = show(small(), "#spot=nothing&node=nobody&open=7.x")
    assert strange.locator("#world .node").count() > 3


@pytest.mark.slow
def test_paper_has_one_page_without_controls(show: Show, tmp_path: Path) -> None:
    page = show(resnet())
    page.pdf(path=str(tmp_path / "print.pdf"), prefer_css_page_size=True)
    assert (tmp_path / "print.pdf").read_bytes().count(b"/Type /Page\n") == 1
    page.emulate_media(media="print")
    assert (
        page.locator(".tools").is_hidden() and page.locator("aside").is_hidden() and page.locator("h1").is_visible()
    )


@pytest.mark.slow
def test_a_notebooks_closed_frame_fits_when_it_opens(show: Show) -> None:
    page = show(small())
    page.set_content(f'<body style="width:880px">{framed(to_html(small().scene()))}</body>')
    page.locator("summary").click()
    page.wait_for_timeout(400)
    frame = page.frames[1]
    assert faults(frame) == {}, measured(frame)
    frame.locator("#theme").click()


@pytest.mark.slow
@pytest.mark.parametrize("what", [small, pair])
def test_forced_colours_keep_text_and_lines(show: Show, what: Callable[[], Any]) -> None:
    page = show(what(), forced_colors="active")
    ground, text = (
        page.evaluate(f"getComputedStyle(document.querySelector('{place}')).fill")
        for place in (".node rect", ".node text")
    )
    assert ground != text


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
    assert faults(page) == {} and "a shallower parameter, passed in" in page.inner_text("footer")


@pytest.mark.slow
def test_the_page_says_of_which_mode_it_is_and_what_is_unknown(show: Show) -> None:
    train_model = fxcollab.transform(Auxiliary(), splits=["body"], seed=0)
    page = show(fxcollab.diff(train_model, training=False))
    assert (
        "eval mode" in page.inner_text("header") and page.title() == "Auxiliary: training graph, 2 heads, eval mode"
    )
    assert "only train mode's graph is counted" in page.inner_text("aside")


# The file.


@pytest.mark.slow
def test_the_file_is_small_and_the_same_twice() -> None:
    one, other = (to_html(resnet().scene()) for _ in range(2))
    assert one == other and len(one.encode()) <= 100_000


def test_the_file_holds_its_data_once_and_asks_for_nothing() -> None:
    page = to_html(small().scene())
    assert "sourceMappingURL" not in page and "http://" not in page.replace("http://www.w3.org", "")
    start = page.index('id="data">') + len('id="data">')
    assert len(json.loads(page[start : page.index("</script>", start)])["lanes"]) == 4
