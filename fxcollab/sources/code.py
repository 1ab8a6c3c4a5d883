"""Sources that name Python code: files and modules."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import pkgutil
import re
import sys
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from torch import nn

from fxcollab.errors import SourceError, closest
from fxcollab.sources.loaded import (
    Loaded,
    did_you_mean,
    executing,
    is_within,
    loaded_from,
    missing_arguments,
    user_code,
)
from fxcollab.sources.source import FILE_MODULE, Source

_CALLED = ("model", "build_model", "get_model", "create_model", "make_model")
_serial = itertools.count(1)


def load_file(source: Source) -> Loaded:
    """Executes the file; without a name its model is found as `load` documents."""
    path = Path(source.location)
    module = _execute(path)
    source = source if source.name else replace(source, name=_find(source, module))
    value = _lookup(source, module)
    again = None if _is_borrowed(value, module) else lambda: _lookup(source, _execute(path))
    return loaded_from(source, value, path.parent, again)


def load_module(source: Source) -> Loaded:
    """Imports the module."""
    return loaded_from(source, imported(source.location, str(source.name)), _folder_of(source.location))


def imported(location: str, name: str) -> object:
    """What a module defines under a name; modules in the current folder are found, too.

    Raises:
        SourceError: it can't be imported, or has no such name.
    """
    with user_code(f"`{location}` can't be imported", _folder_of(location), location), executing(f"`{location}`"):
        module = _import(location)
    return _lookup(Source("module", location, name), module)


def _folder_of(location: str) -> Path | None:
    """The current folder, unless the module lies elsewhere: then what it imports isn't found in this one."""
    top = location.partition(".")[0]
    lies_here = PathFinder.find_spec(top, [str(Path.cwd())])
    return Path.cwd() if lies_here or not (top in sys.modules or PathFinder.find_spec(top)) else None


def _is_borrowed(value: object, module: ModuleType) -> bool:
    """Whether another module holds ``value`` too: executing the file again would give the same object."""
    others = (other for other in list(sys.modules.values()) if other is not module)
    return any(item is value for other in others for item in list(getattr(other, "__dict__", {}).values()))


def _find(source: Source, module: ModuleType) -> str:
    """The name of a file's model, as `load` documents."""
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
            missing = missing_arguments(value, dict(source.arguments))
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
            hint = did_you_mean(part, (name for name in dir(value) if not name.startswith("__")))
            what = f"`{replace(source, name=None).short}` has no `{source.name}`"
            raise SourceError(what, where=getattr(module, "__file__", None), hint=hint) from error
    return value


def _execute(path: Path) -> ModuleType:
    """A file as a new module, which stays in ``sys.modules``: pickling looks for it there."""
    if not os.path.isfile(path):  # noqa: PTH113 (which answers for every text)
        near = closest(path.name, sorted(file.name for file in path.parent.glob("*.py")))
        hint = f"in that folder: {near}" if near else None
        raise SourceError(f"there is no file {path.name}", where=str(path.parent), hint=hint)
    stem = re.sub(r"\W", "_", path.stem)
    name = f"{FILE_MODULE}{stem}_{next(_serial)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path.name} is not a Python file", where=str(path), hint="its name must end with .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with user_code(f"{path.name} failed when it was executed", path.parent, name), executing(path.name):
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
        if not is_within(missing, name):
            raise  # the module exists, and lacks something that it imports itself
        parent = missing.rpartition(".")[0]
        folders = getattr(sys.modules[parent], "__path__", []) if parent else None
        names = (f"{parent}.{m.name}".lstrip(".") for m in pkgutil.iter_modules(folders))
        names = (near for near in names if near not in sys.stdlib_module_names)
        hint = did_you_mean(missing, names, "run this in the folder that holds it, or set PYTHONPATH")
        raise SourceError(f"there is no module `{missing}`", hint=hint) from error
