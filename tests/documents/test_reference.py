"""The API reference says what users have to know: arguments, defaults, shapes, units, errors."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from samples.guides.api import main, public

UNITS = {
    "flops": "operations",
    "memory": "bytes",
    "activations": "bytes",
    "parameters": "number of values",
    "time": "ratio",
    "max_time": "ratio",
    "max_memory": "ratio",
}
"""What these quantities are measured in, wherever an attribute or argument has such a name."""
SHAPE = re.compile(r"\((N|C|H|T|\.\.\.)\b.*?\)|any shape|scalar|shaped like")


def sections(text: str) -> dict[str, str]:
    """The parts of a docstring by heading; "" is the text before the first."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Example):\n", text, flags=re.M)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> dict[str, str]:
    """Of a section, what is said of each name."""
    found: dict[str, str] = {}
    for match in re.finditer(r"^    (?P<names>[\w, ]+): (?P<text>.*(?:\n(?:     .*)?)*)", section, re.M):
        found |= dict.fromkeys(re.split(r",\s*", match["names"]), " ".join(match["text"].split()))
    return found


def described(thing: Any) -> dict[str, str]:
    parts = sections(inspect.getdoc(thing) or "")
    return entries(parts.get("Args", "")) | entries(parts.get("Attributes", ""))


def parameters(thing: Any) -> Iterator[inspect.Parameter]:
    for each in inspect.signature(thing).parameters.values():
        if each.name != "self" and each.kind is not each.VAR_POSITIONAL and not each.name.startswith("_"):
            yield each


def is_error(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


CALLABLES = {name: thing for name, thing in public().items() if not is_error(thing)}
RESULTS = {"Diff", "Comparison", "Report", "Summary", "CollabGraphModule"}
"""Made by the library and only read by users: their attributes are described, or shown by what prints them."""


def missing() -> Iterator[str]:
    for name, thing in CALLABLES.items():
        text, said = inspect.getdoc(thing) or "", described(thing)
        if name.rpartition(".")[2] in RESULTS or getattr(thing, "_is_protocol", False):
            continue
        for each in parameters(thing):
            entry = said.get(each.name, "")
            if not entry and f"`{each.name}`" not in text:
                yield f"{name}: says nothing of {each.name}"
            elif entry and not has_default(each, entry) and not dataclasses.is_dataclass(thing):
                yield f"{name}: {each.name} is {each.default!r} by default, which isn't said"
            if entry and "Tensor" in str(each.annotation) and not SHAPE.search(entry):
                yield f"{name}: of what shape is {each.name}?"
        for key, unit in UNITS.items():
            if key in said and unit not in said[key]:
                yield f"{name}: {key} is in {unit}"
        if "Raises" not in sections(text) and raises(thing):
            yield f"{name}: raises an error that isn't named"


def has_default(parameter: inspect.Parameter, entry: str) -> bool:
    default = parameter.default
    if default is parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
        return True
    return "default" in entry or str(default) in entry or getattr(default, "__name__", "?") in entry


def raises(thing: Any) -> bool:
    """Whether a function, or the constructor of a class, raises one of our errors itself."""
    if isinstance(thing, type):
        thing = vars(thing).get("__init__")
    if not inspect.isfunction(thing) or "<string>" in thing.__code__.co_filename:
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def test_arguments_defaults_shapes_units_and_errors_are_said() -> None:
    assert len(CALLABLES) > 40
    assert not list(missing())


def test_all_errors_say_what_they_are() -> None:
    for name, thing in public().items():
        assert inspect.getdoc(thing), name


@pytest.mark.slow
def test_the_reference_is_built(tmp_path: Path) -> None:
    pages = main(tmp_path)
    text = (tmp_path / "fxcollab.html").read_text()
    assert len(pages) > 4
    for name in CALLABLES:
        if name.count(".") == 1:
            assert f'id="{name.rpartition(".")[2]}"' in text, name
