"""Links lead somewhere."""

from __future__ import annotations

import inspect
import re

import pytest

import fxcollab
from fxcollab.diffs.views import VIEWS
from fxcollab.patterns import _BUILT_IN, PATTERNS
from tests.documents.reading import GUIDES, NAMES, ROOT, anchors, links

HOSTS = {"https://arxiv.org", "https://pytorch.org", "https://docs.astral.sh", "https://github.com"}
OTHERS = ("tests/README.md", "samples/paper/results/README.md", "samples/diff/README.md", "CHANGELOG.md")


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_links_within_the_repository_resolve(name: str) -> None:
    file = ROOT / name
    text = file.read_text()
    for link in links(text):
        if re.match(r"https?:", link):
            assert re.match(r"https://[^/]+", link)[0] in HOSTS, link  # type: ignore[index]
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{link}: there is no such file"
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}: there is no such heading"


def test_every_guide_is_reached_from_the_readme() -> None:
    reached = {(ROOT / link.partition("#")[0]).resolve() for link in links((ROOT / "README.md").read_text())}
    guides = {*GUIDES.glob("*.md"), *GUIDES.glob("*.ipynb")}
    assert guides <= reached


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    commands = "python3 -m venv"
    assert [n for n, line in enumerate(lines, 1) if len(line) > 130 and not line.startswith(commands)] == []


def test_every_pattern_stands_wherever_patterns_are_listed() -> None:
    texts = {
        name: (ROOT / name).read_text() for name in ("README.md", "samples/guides/glossary.md", "samples/train.py")
    }
    texts["transform"] = str(fxcollab.transform.__doc__)
    missing = [(place, name) for place, text in texts.items() for name in PATTERNS if name not in text]
    assert missing == []


def test_patterns_that_take_heads_are_named_where_heads_are_explained() -> None:
    takers = [name for name, function in _BUILT_IN.items() if "heads" in inspect.signature(function).parameters]
    assert takers
    for place in ("cli/planning.py", "samples/train.py", "fxcollab/_transform.py"):
        text = (ROOT / place).read_text()
        explained = re.search(r"^ +heads: (?!int \| None = None,$).*", text, re.MULTILINE)
        assert explained and all(name in explained[0] for name in takers), place


def test_every_view_is_named_where_views_are_listed() -> None:
    places = "cli/commands.py", "fxcollab/diffs/shown.py", "samples/guides/inside.md"
    texts = {place: (ROOT / place).read_text() for place in places}
    assert [(place, view) for place, text in texts.items() for view in VIEWS if view not in text] == []
