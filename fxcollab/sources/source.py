"""SOURCE, as text and as plain data; `load` makes a model from it.

A source reads ``model.py``, ``model.py:name``, ``package.module:name``, ``torchvision:NAME``, ``timm:NAME`` or
``hf:NAME_OR_PATH``:

    >>> source = Source.parse("torchvision:resnet18", {"num_classes": 10})
    >>> load(source).model.fc.out_features
    10
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Literal, TypeAlias

from fxcollab.errors import ArtifactError, SourceError

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
Kind: TypeAlias = Literal["file", "module", "torchvision", "timm", "hf"]

FILE_MODULE = "fxcollab_source_"
"""The prefix of names of modules that were made from a source's file."""
REMOTE = "trust_remote_code"
"""The argument by which transformers runs code from elsewhere: given at every call, and never stored."""

_FORMS = "model.py, model.py:NAME, package.module:NAME, torchvision:NAME, timm:NAME or hf:NAME_OR_PATH"
_LIBRARIES: tuple[Kind, ...] = ("torchvision", "timm", "hf")
_PYTHON_WORDS: Mapping[str, Json] = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Source:
    """Where a model comes from: plain data that can be written down and loaded again.

    Attributes:
        kind: "file", "module", "torchvision", "timm" or "hf".
        location: a file's absolute path, a dotted module name, the name of a library's model, or the absolute path
            of a folder that transformers has saved.
        name: the object's name, dotted where it is nested; None (default): found by the rule of `load`.
        arguments: keyword arguments for the object's call, as sorted pairs (default: none).
    """

    kind: Kind
    location: str
    name: str | None = None
    arguments: tuple[tuple[str, Json], ...] = ()

    @classmethod
    def parse(
        cls, text: str, arguments: Mapping[str, Json] | None = None, *, relative_to: Path | None = None
    ) -> Source:
        """Read the text form; nothing is imported or executed.

        Args:
            text: ``model.py``, ``model.py:name``, ``package.module:name``, ``torchvision:NAME``, ``timm:NAME`` or
                ``hf:NAME_OR_PATH``.
            arguments: keyword arguments for the object's call (default: none).
            relative_to: where a relative file path starts (default: the current directory).

        Raises:
            SourceError: ``text`` has another form.
        """
        if not text.isprintable():
            raise SourceError(f"{text!r} is not a source", why="it has control characters", hint=f"write {_FORMS}")
        pairs = tuple(sorted((arguments or {}).items()))
        prefix, _, rest = text.partition(":")
        place, _, name = text.rpartition(":")
        for library in _LIBRARIES:
            if prefix == library and rest:
                is_folder = library == "hf" and (
                    rest.startswith((".", "/")) or os.path.isdir(_folder(rest, relative_to))  # noqa: PTH112
                )
                return cls(library, _absolute(rest, relative_to) if is_folder else rest, None, pairs)
        if text.endswith(".py"):
            return cls("file", _absolute(text, relative_to), None, pairs)
        if place.endswith(".py") and _is_dotted(name):
            return cls("file", _absolute(place, relative_to), name, pairs)
        if _is_dotted(place) and _is_dotted(name):
            return cls("module", place, name, pairs)
        raise SourceError(f"`{text}` is not a source", hint=f"write {_FORMS}")

    def to_json(self, relative_to: Path) -> dict[str, Json]:
        """The source as JSON data; a file's path is written relative to the folder ``relative_to``.

        ``trust_remote_code`` is left out.
        """
        location = self.location
        if self._is_path:
            location = PurePath(os.path.relpath(location, relative_to.resolve())).as_posix()
            location = location if self.kind == "file" or location.startswith(".") else f"./{location}"
        arguments = {name: value for name, value in self.arguments if name != REMOTE}
        return {"kind": self.kind, "location": location, "name": self.name, "arguments": arguments}

    @classmethod
    def from_json(cls, data: object, relative_to: Path) -> Source:
        """Read what `to_json` gave for the folder ``relative_to``.

        Raises:
            ArtifactError: ``data`` is not what `to_json` writes.
        """
        match data:
            case {
                "kind": "file" | "module" | "torchvision" | "timm" | "hf" as kind,
                "location": str(location),
                "name": None | str() as name,
                "arguments": dict(arguments),
            } if location and (name or (name is None and kind != "module")) and REMOTE not in arguments:
                is_path = kind == "file" or (kind == "hf" and location.startswith("."))
                location = _absolute(location, relative_to) if is_path else location
                return cls(kind, location, name, tuple(sorted(arguments.items())))
        why = f"it reads {data!r}"
        hint = "transform the model again"
        raise ArtifactError("the stored source is damaged", where=str(relative_to), why=why, hint=hint)

    def __str__(self) -> str:
        place = f"{self.kind}:{self.location}" if self.kind in _LIBRARIES else self.location
        return f"{place}:{self.name}" if self.name else place

    @property
    def short(self) -> str:
        """The text form without folders."""
        return str(replace(self, location=Path(self.location).name)) if self._is_path else str(self)

    @property
    def _is_path(self) -> bool:
        return self.kind == "file" or (self.kind == "hf" and Path(self.location).is_absolute())


def parse_argument(text: str) -> tuple[str, Json]:
    """Read ``NAME=VALUE``; the value is JSON, or Python's True, False or None, or else the text itself.

    Raises:
        SourceError: there is no ``=``, or no Python name before it.
    """
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise SourceError(f"`{text}` is not a model argument", hint="write NAME=VALUE, as in num_classes=10")
    try:
        parsed: Json = json.loads(value)
    except (ValueError, RecursionError):
        parsed = _PYTHON_WORDS.get(value, value)
    return name, parsed


def source_of(factory: Callable[..., object]) -> Source | None:
    """The source of a function or class that can be imported again; None for any other callable."""
    module_name, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)
    module = sys.modules.get(str(module_name))
    try:
        if module is None or attrgetter(str(name))(module) != factory:
            return None
    except AttributeError:
        return None
    # Other processes can't import these names, but they can load the file.
    if module.__name__.startswith(("__main__", "__mp_main__", FILE_MODULE)):
        file = getattr(module, "__file__", None)
        return Source("file", _absolute(file), name) if file else None
    return Source("module", module.__name__, name)


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _absolute(path: str, folder: Path | None = None) -> str:
    return str(_folder(path, folder))


def _folder(path: str, folder: Path | None) -> Path:
    return Path(os.path.realpath((folder or Path.cwd()) / path))  # which takes links in a circle
