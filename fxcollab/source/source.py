"""From SOURCE text to a model.

A source reads ``model.py``, ``model.py:name``, ``package.module:name`` or ``torchvision:NAME``:

    >>> source = Source.parse("torchvision:resnet18", {"num_classes": 10})
    >>> source.load().model.fc.out_features
    10
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path, PurePath
from types import ModuleType
from typing import Literal, TypeAlias

from torch import nn

from fxcollab.errors import ArtifactError, SourceError, closest

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
Make: TypeAlias = Callable[[], nn.Module]

_FORMS = "model.py, model.py:NAME, package.module:NAME or torchvision:NAME"
_CALLED = ("model", "build_model", "get_model", "create_model", "make_model")
_PYTHON_WORDS: Mapping[str, Json] = {"True": True, "False": False, "None": None}
_FILE_MODULE = "fxcollab_source_"
_serial = itertools.count(1)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: plain data that can be written down and loaded again.

    Attributes:
        kind: "file", "module" or "torchvision".
        location: a file's absolute path, a dotted module name, or the name of a torchvision model.
        name: the object's name, dotted where it is nested; None (default): found by the rule of `load`.
        arguments: keyword arguments for the object's call, as sorted pairs (default: none).
    """

    kind: Literal["file", "module", "torchvision"]
    location: str
    name: str | None = None
    arguments: tuple[tuple[str, Json], ...] = ()

    @classmethod
    def parse(
        cls, text: str, arguments: Mapping[str, Json] | None = None, *, relative_to: Path | None = None
    ) -> Source:
        """Read the text form; nothing is imported or executed.

        Args:
            text: ``model.py``, ``model.py:name``, ``package.module:name`` or ``torchvision:NAME``.
            arguments: keyword arguments for the object's call (default: none).
            relative_to: where a relative file path starts (default: the current directory).

        Raises:
            SourceError: ``text`` has none of these forms.
        """
        pairs = tuple(sorted((arguments or {}).items()))
        prefix, _, rest = text.partition(":")
        place, _, name = text.rpartition(":")
        if prefix == "torchvision" and rest:
            return cls("torchvision", rest, None, pairs)
        if prefix in ("timm", "hf") and rest:
            why = f"this version of fxcollab doesn't support the form {prefix}:NAME"
            raise SourceError(f"`{text}` can't be loaded", why=why, hint="build the model in a model.py")
        if text.endswith(".py"):
            return cls("file", _absolute(text, relative_to), None, pairs)
        if place.endswith(".py") and _is_dotted(name):
            return cls("file", _absolute(place, relative_to), name, pairs)
        if _is_dotted(place) and _is_dotted(name):
            return cls("module", place, name, pairs)
        raise SourceError(f"`{text}` is not a source", hint=f"write {_FORMS}")

    def load(self) -> Loaded:
        """Execute or import what the source names, and build its model.

        A file without a name gives its ``model``, else its ``build_model``, ``get_model``, ``create_model``
        or ``make_model``, else its one module instance (one with parameters: a loss is no model), else
        the one module class that the file itself defines and that needs no further argument.

        Raises:
            SourceError: no model was found, or several, or the code behind the source failed.
        """
        load = {"file": _load_file, "module": _load_module, "torchvision": _load_torchvision}[self.kind]
        return load(self)

    def to_json(self, relative_to: Path) -> dict[str, Json]:
        """The source as JSON data; a file's path is written relative to the folder ``relative_to``."""
        location = self.location
        if self.kind == "file":
            location = PurePath(os.path.relpath(location, relative_to.resolve())).as_posix()
        return {"kind": self.kind, "location": location, "name": self.name, "arguments": dict(self.arguments)}

    @classmethod
    def from_json(cls, data: object, relative_to: Path) -> Source:
        """Read what `to_json` gave for the folder ``relative_to``.

        Raises:
            ArtifactError: ``data`` is not what `to_json` writes.
        """
        match data:
            case {
                "kind": "file" | "module" | "torchvision" as kind,
                "location": str(location),
                "name": None | str() as name,
                "arguments": dict(arguments),
            } if location and (name or (name is None and kind != "module")):
                location = _absolute(location, relative_to) if kind == "file" else location
                return cls(kind, location, name, tuple(sorted(arguments.items())))
        why = f"it reads {data!r}"
        hint = "transform the model again"
        raise ArtifactError("the stored source is damaged", where=str(relative_to), why=why, hint=hint)

    def __str__(self) -> str:
        place = f"torchvision:{self.location}" if self.kind == "torchvision" else self.location
        return f"{place}:{self.name}" if self.name else place

    @property
    def _short(self) -> str:
        return str(replace(self, location=Path(self.location).name)) if self.kind == "file" else str(self)


@dataclass(frozen=True)
class Loaded:
    """A source's model.

    Attributes:
        source: the source, with the name that was found.
        model: the model.
        factory: makes a new model whenever it is called, or raises `SourceError`; None where the source
            can't give a fresh one (an instance in an imported module, pretrained torchvision weights).
    """

    source: Source
    model: nn.Module
    factory: Make | None


def parse_argument(text: str) -> tuple[str, Json]:
    """Read ``NAME=VALUE``; the value is JSON, or Python's True, False or None, or else the text itself.

    Raises:
        SourceError: there is no ``=``, or what stands before it is no name.
    """
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise SourceError(f"`{text}` is not a model argument", hint="write NAME=VALUE, as in num_classes=10")
    try:
        parsed: Json = json.loads(value)
    except ValueError:
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
    # Only this process knows these by their names; the file can be loaded anywhere.
    if module.__name__.startswith(("__main__", "__mp_main__", _FILE_MODULE)):
        file = getattr(module, "__file__", None)
        return Source("file", _absolute(file), name) if file else None
    return Source("module", module.__name__, name)


def _load_file(source: Source) -> Loaded:
    path = Path(source.location)
    module = _execute(path)
    source = source if source.name else replace(source, name=_find(source, module))
    value = _lookup(source, module)
    again = None if _is_borrowed(value, module) else lambda: _lookup(source, _execute(path))
    return _loaded(source, value, path.parent, again)


def _load_module(source: Source) -> Loaded:
    folder = Path.cwd()
    with _user_code(f"`{source.location}` can't be imported", folder, source.location):
        module = _import(source.location)
    return _loaded(source, _lookup(source, module), folder)


def _load_torchvision(source: Source) -> Loaded:
    with _user_code("torchvision can't be imported", Path.cwd(), "torchvision"):
        from torchvision import models
    try:
        builder = models.get_model_builder(source.location)
    except ValueError as error:
        near = closest(source.location, models.list_models())
        hint = f"did you mean {near}?" if near else "torchvision.models.list_models() lists them"
        raise SourceError(f"torchvision has no model `{source.location}`", hint=hint) from error
    weights = [name for name in inspect.signature(builder).parameters if name.startswith("weights")]
    pretrained = any(value is not None for name, value in source.arguments if name in weights)
    defaults: dict[str, Json] = dict.fromkeys(weights)  # segmentation models download a backbone otherwise
    if not pretrained and source.location.lower().endswith(("googlenet", "inception_v3")):
        defaults["init_weights"] = True  # as they do by themselves, but with a warning
    loaded = _loaded(source, partial(builder, **defaults), Path.cwd())
    return replace(loaded, factory=None) if pretrained else loaded


def _loaded(source: Source, value: object, folder: Path, again: Callable[[], object] | None = None) -> Loaded:
    """The model which ``value`` is or makes; ``again`` gives the instance ``value`` a second time, anew."""
    if isinstance(value, nn.Module):
        if source.arguments:
            why = f"it is an instance of {type(value).__name__} already"
            hint = "name the class or function that makes it, or leave the arguments out"
            raise SourceError(f"`{source._short}` takes no arguments", why=why, hint=hint)
        make, model = again and partial(_build, source, again, folder), value
    elif callable(value):
        make = partial(_build, source, value, folder)
        model = make()
    else:
        why = f"it is of type {type(value).__name__}: neither an nn.Module nor something that makes one"
        raise SourceError(f"`{source._short}` is not a model", where=source.location, why=why)
    return Loaded(source, model, make and partial(_fresh, source, make, model))


def _fresh(source: Source, make: Make, first: nn.Module) -> nn.Module:
    model = make()
    if model is first:
        why = "every peer starts from a module of its own"
        hint = "build a new module on every call"
        raise SourceError(f"`{source._short}` gives the same module every time", why=why, hint=hint)
    return model


def _build(source: Source, factory: Callable[..., object], folder: Path) -> nn.Module:
    arguments = dict(source.arguments)
    if missing := _missing(factory, arguments):
        hint = " ".join(f"--model-arg {name}=VALUE" for name in missing)
        what = f"`{source._short}` needs arguments: {', '.join(missing)}"
        raise SourceError(what, where=_defined_at(factory), hint=hint)
    with _user_code(f"`{source._short}` failed to build its model", folder, factory.__module__):
        model = factory(**arguments)
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if inspect.isclass(model) else f"a {type(model).__name__}"
        what = f"`{source._short}` returned {'None' if model is None else kind}, not an nn.Module"
        raise SourceError(what, where=_defined_at(factory), hint="return the model, and nothing else")
    return model


def _missing(factory: Callable[..., object], given: Mapping[str, Json]) -> list[str]:
    """The arguments that ``factory`` still needs."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # written in C: its call will tell
        return []
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [p.name for p in named if p.default is p.empty and p.name not in given]


def _is_borrowed(value: object, module: ModuleType) -> bool:
    """Whether another module holds ``value`` too: executing the file again would give the same object."""
    others = (other for other in list(sys.modules.values()) if other is not module)
    return any(item is value for other in others for item in list(getattr(other, "__dict__", {}).values()))


def _find(source: Source, module: ModuleType) -> str:
    """The name of a file's model, by the rule that `Source.load` states."""
    for name in _CALLED:
        if callable(vars(module).get(name)):
            return name
    seen, instances, classes = [], {}, {}
    for name, value in vars(module).items():
        if isinstance(value, nn.Module):
            seen.append(f"{name} (instance of {type(value).__name__})")
            if any(True for _ in value.parameters()):
                instances[id(value)] = name
        elif callable(value) and getattr(value, "__module__", None) == module.__name__:
            missing = _missing(value, dict(source.arguments))
            is_model = inspect.isclass(value) and issubclass(value, nn.Module)
            kind = "module class" if is_model else "class" if inspect.isclass(value) else "function"
            seen.append(f"{name} ({kind}, needs {', '.join(missing)})" if missing else f"{name} ({kind})")
            if is_model and not missing and not inspect.isabstract(value):
                classes[id(value)] = name
    candidates = list((instances or classes).values())
    if len(candidates) == 1:
        return candidates[0]
    file = Path(source.location).name
    raise SourceError(
        f"{file} defines {'several models' if candidates else 'no model'}",
        where=source.location,
        why=f"it has {', '.join(seen) or 'neither a module nor a class nor a function'}",
        hint=f"name the one you mean, as in {file}:{(*candidates, 'NAME')[0]}, or call it `model`",
    )


def _lookup(source: Source, module: ModuleType) -> object:
    value: object = module
    for part in str(source.name).split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            near = closest(part, (name for name in dir(value) if not name.startswith("__")))
            hint = f"did you mean {near}?" if near else None
            what = f"`{replace(source, name=None)._short}` has no `{source.name}`"
            raise SourceError(what, where=getattr(module, "__file__", None), hint=hint) from error
    return value


def _execute(path: Path) -> ModuleType:
    """A file as a new module, which stays in ``sys.modules``: pickling looks for it there."""
    if not path.is_file():
        near = closest(path.name, sorted(file.name for file in path.parent.glob("*.py")))
        hint = f"in that folder: {near}" if near else None
        raise SourceError(f"there is no file {path.name}", where=str(path.parent), hint=hint)
    stem = re.sub(r"\W", "_", path.stem)
    name = f"{_FILE_MODULE}{stem}_{next(_serial)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # true of every .py file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _user_code(f"{path.name} failed when it was executed", path.parent, name):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not _is_within(missing, name):
            raise  # the module exists, and lacks something that it imports itself
        parent = missing.rpartition(".")[0]
        folders = getattr(sys.modules[parent], "__path__", []) if parent else None
        near = closest(missing, (f"{parent}.{m.name}".lstrip(".") for m in pkgutil.iter_modules(folders)))
        hint = f"did you mean {near}?" if near else "run this in the folder that holds it, or set PYTHONPATH"
        raise SourceError(f"there is no module `{missing}`", hint=hint) from error


@contextmanager
def _user_code(what: str, folder: Path, module_name: str) -> Iterator[None]:
    """Run a module's code with ``folder`` importable; what it raises becomes a `SourceError`."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except SourceError:
        raise
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise SourceError(what, where=_last_line(error, module_name), why=why, hint=_advice(error)) from error
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _advice(error: BaseException) -> str | None:
    if isinstance(error, SystemExit):
        return "move what the script runs under `if __name__ == '__main__':`"
    if isinstance(error, ImportError) and "relative import" in str(error):
        return "the file belongs to a package: name it as package.module:NAME"
    return None


def _last_line(error: BaseException, module_name: str) -> str | None:
    """Where the innermost frame inside the module, or inside a package that holds it, stands."""
    where = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if _is_within(frame.f_globals.get("__name__", ""), module_name):
            where = f"{frame.f_code.co_filename}:{line}"
    return where


def _defined_at(factory: Callable[..., object]) -> str | None:
    with suppress(OSError, TypeError):
        return f"{inspect.getsourcefile(factory)}:{inspect.getsourcelines(factory)[1]}"
    return None


def _is_within(package: str, module_name: str) -> bool:
    return f"{module_name}.".startswith(f"{package}.")


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _absolute(path: str, folder: Path | None = None) -> str:
    return str(((folder or Path.cwd()) / path).resolve())
