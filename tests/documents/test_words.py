"""The documents use words that the glossary explains, and names that exist."""

from __future__ import annotations

import inspect
import keyword
import re
from pathlib import Path

import pytest
from fxcollab_cli.app import app
from typer.main import get_command

import fxcollab
from samples.guides.api import public
from tests.documents.reading import GUIDES, NAMES, ROOT, blocks, code_words, prose

GLOSSARY = (GUIDES / "glossary.md").read_text()
ENTRIES = re.findall(r"^- \*\*([\w -]+)\*\*: ", GLOSSARY, re.M)
# Words of the code that mean in the documents what they mean everywhere.
PLAIN = re.findall(
    r"\w+",
    """
    arguments attributes batches boxes branches build candidates captured checkpoint checkpointing checks choice
    choose code collaborative command commands compare copied costs counted cuts data depth directory distributed
    duplicate errors examples factor features files finite fixed flops folder forwards fxcollab gated gradients
    groups guessed hint inputs integrations into layout libraries lightning limits load loaded loss mark memory
    modes mutual name names nearest nodes notebook observe operations optimizer option options order other outputs
    page parameters part picture planning reason rows runs shape shared shown start steps structure task tensors
    terminal time tokens transformers trust verify version weight weights what where
    """,
)


def words_of_the_code() -> set[str]:
    """Names of modules and of public arguments."""
    files = [*(ROOT / "fxcollab").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    found = {file.stem for file in files} | {file.parent.name for file in files}
    for thing in public().values():
        found |= set(inspect.signature(thing).parameters)  # type: ignore[arg-type]
    return {name for name in found if "_" not in name and len(name) > 3}


def known() -> set[str]:
    """What single words in code marks may be: public names and arguments, commands and options, extras, entries."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = {*fxcollab.__all__, *ENTRIES, *commands, "fxcollab", "--version", "--help"}
    found |= {option for each in commands.values() for parameter in each.params for option in parameter.opts}
    for thing in public().values():
        found |= set(inspect.signature(thing).parameters)  # type: ignore[arg-type]
        found |= {name for name in dir(thing) if not name.startswith("_")}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_words_of_the_code_are_in_the_glossary_or_plain(name: str) -> None:
    written = set(re.findall(r"[a-z]+", prose((ROOT / name).read_text()).lower()))
    explained = {
        form for entry in ENTRIES for word in entry.lower().split() for form in (word, word + "s", word + "es")
    }
    unknown = sorted((written & words_of_the_code()) - explained - set(PLAIN) - set(keyword.kwlist))
    assert not unknown, f"{name} has words of the code: explain {unknown} in the glossary, or add them to PLAIN"


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("glossary.md")])
def test_every_document_leads_to_the_glossary(name: str) -> None:
    assert "glossary.md" in (ROOT / name).read_text()


def test_the_readme_explains_its_words_where_it_first_uses_them() -> None:
    text = (ROOT / "README.md").read_text()
    for entry in ("split", "trunk", "branch", "head"):
        before = prose(text.partition(f"**{entry}**")[0].partition("## In Python")[2])
        assert f"**{entry}**" in text
        assert not re.search(rf"\b{entry}(s|es)?\b", before), entry


@pytest.mark.parametrize("name", NAMES)
def test_names_in_code_marks_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    shown = "\n".join(block.text for block in blocks(text))
    names, unknown = known(), []
    for code in (code for code in code_words(text) if not code.startswith(("python", "pip"))):
        for word in re.findall(r"(?<![\w./\"'@:-])--?[a-z][\w-]+|fxcollab(?:\.\w+)+", code):
            path = word.split(".")
            if word.startswith("--"):
                unknown += [word] if word not in names and word not in shown else []
            elif not exists(path) and not (ROOT / Path(*path)).exists():
                unknown.append(word)
    assert not unknown


def exists(path: list[str]) -> bool:
    """Whether a dotted name can be reached."""
    thing: object = fxcollab
    for part in path[1:]:
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


@pytest.mark.parametrize(
    "entry", ["split", "head", "peer", "level", "fan-out", "branch", "trunk", "rescale", "pattern"]
)
def test_the_glossary_knows_the_words_of_the_design(entry: str) -> None:
    assert entry in ENTRIES


def test_every_room_is_on_the_map() -> None:
    text = (GUIDES / "contributing.md").read_text()
    rooms = {f"fxcollab/{file.parent.name}" for file in (ROOT / "fxcollab").glob("*/__init__.py")}
    assert set(re.findall(r"`(fxcollab/\w+)` \|", text)) == rooms
