"""What stands in a document: its blocks of code, its links, its prose.

A comment before a block says what the tests do with it: ``<!-- slow -->`` runs it in the slow part, at the top of a
document all of it; ``<!-- run by: FILE -->`` names the test that runs these scripts, and ``<!-- not run: why -->``
says why it can't be run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "samples/guides"
DOCUMENTS = (ROOT / "README.md", *sorted(GUIDES.glob("*.md")))
NAMES = [file.relative_to(ROOT).as_posix() for file in DOCUMENTS]

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_MADE = re.compile(r"<!-- made: (?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- end -->", re.S)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: python, console (commands and what they print), sh (commands), or text (what the block
            before prints).
        text: what stands in it.
        line: of the document, on which the text begins.
        note: the comment before it.
    """

    language: str
    text: str
    line: int
    note: str = ""

    @property
    def is_slow(self) -> bool:
        return self.note == "slow"

    @property
    def is_run(self) -> bool:
        return self.language != "bibtex" and not self.note.startswith(("not run: ", "run by: "))

    @property
    def run_by(self) -> str:
        """The test that runs it in the place of ours; "" for none."""
        return self.note.removeprefix("run by: ") if self.note.startswith("run by: ") else ""


def blocks(document: str) -> list[Block]:
    """The blocks of a document, in order."""
    whole = "slow" if document.startswith("<!-- slow -->") else ""
    found = []
    for match in _FENCE.finditer(document):
        before = document[: match.start()].rstrip("\n")
        note = re.search(r"<!-- (slow|run by: [^>]+|not run: [^>]+) -->$", before)
        line = document.count("\n", 0, match.start("text")) + 1
        found.append(Block(match["language"], match["text"], line, note[1] if note else whole))
    return found


def prose(document: str) -> str:
    """The text without code, comments and the targets of links; what code in a line names is left out, too."""
    text = _COMMENT.sub("", _FENCE.sub("", document))
    return re.sub(r"`[^`]*`", "", re.sub(r"\]\([^)]*\)", "]", text))


def made(document: str) -> dict[str, str]:
    """The parts that are generated, by name."""
    return {match["name"]: match["text"] for match in _MADE.finditer(document)}


def without_made(document: str) -> str:
    """The document as far as it is written by hand."""
    return _MADE.sub("", document)


def code_words(document: str) -> Iterator[str]:
    """What stands between single backquotes."""
    for match in re.finditer(r"`([^`\n]+)`", _COMMENT.sub("", _FENCE.sub("", document))):
        yield match[1]


def links(document: str) -> Iterator[str]:
    """The targets of links and pictures."""
    text = _FENCE.sub("", document)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)


def anchors(document: str) -> set[str]:
    """Of the headings, as code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", _FENCE.sub("", document), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
