"""Running the code that a source names: its model, and a factory of more like it."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from fxcollab.errors import CaptureError, SourceError, closest
from fxcollab.sources.source import Source

Make: TypeAlias = Callable[[], nn.Module]


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


def loaded_from(
    source: Source, value: object, folder: Path | None, again: Callable[[], object] | None = None
) -> Loaded:
    """The model that ``value`` is or makes; ``again`` makes a new instance like ``value``."""
    if isinstance(value, nn.Module):
        if source.arguments:
            why = f"it is an instance of {type(value).__name__} already"
            hint = "name the class or function that makes it, or leave the arguments out"
            raise SourceError(f"`{source.short}` takes no arguments", why=why, hint=hint)
        make, model = again and partial(build_from, source, again, folder), value
    elif callable(value):
        make = partial(build_from, source, value, folder)
        model = make()
    else:
        why = f"it is of type {type(value).__name__}: neither an nn.Module nor something that makes one"
        hint = "name a module, or a class or function that makes one: model.py:NAME"
        raise SourceError(f"`{source.short}` is not a model", where=source.location, why=why, hint=hint)
    return Loaded(source, model, make and partial(_fresh, source, make, model))


def _fresh(source: Source, make: Make, first: nn.Module) -> nn.Module:
    model = make()
    if model is first:
        why = "every peer starts from a module of its own"
        hint = "build a new module on every call"
        raise SourceError(f"`{source.short}` gives the same module every time", why=why, hint=hint)
    return model


def build_from(source: Source, factory: Callable[..., object], folder: Path | None) -> nn.Module:
    """Call ``factory`` with the source's arguments, with ``folder``, if any, on the import path.

    Raises:
        SourceError: arguments are missing, the call failed, or it didn't return a module.
    """
    arguments = dict(source.arguments)
    if missing := missing_arguments(factory, arguments):
        hint = " ".join(f"--model-arg {name}=VALUE" for name in missing)
        what = f"`{source.short}` needs arguments: {', '.join(missing)}"
        raise SourceError(what, where=_defined_at(factory), hint=hint)
    module_name = getattr(factory, "__module__", None) or type(factory).__module__
    with user_code(f"`{source.short}` failed to build its model", folder, module_name):
        model = factory(**arguments)
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if inspect.isclass(model) else f"a {type(model).__name__}"
        what = f"`{source.short}` returned {'None' if model is None else kind}, not an nn.Module"
        raise SourceError(what, where=_defined_at(factory), hint="return the model, and nothing else")
    return model


def missing_arguments(factory: Callable[..., object], given: Mapping[str, object]) -> list[str]:
    """The arguments that ``factory`` still needs."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature
        return []
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [p.name for p in named if p.default is p.empty and p.name not in given]


def _defined_at(factory: Callable[..., object]) -> str | None:
    with suppress(OSError, TypeError):
        return f"{inspect.getsourcefile(factory)}:{inspect.getsourcelines(factory)[1]}"
    return None


def model_of(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The model itself, or what a zero-argument factory makes.

    Raises:
        CaptureError: it makes something else, or was scripted or exported.
    """
    factory: Any = model
    if isinstance(factory, torch.jit.ScriptModule):
        raise CaptureError(
            f"{factory.original_name} is scripted, so that its forward is no Python any more.",
            hint="transform the module before torch.jit.script; what prune returns scripts",
        )
    if isinstance(factory, torch.export.ExportedProgram):
        raise CaptureError("An exported program is not a module.", hint="give exported.module()")
    if isinstance(factory, nn.Module):
        return factory
    made = factory()
    if not isinstance(made, nn.Module):
        raise CaptureError(
            f"The factory returned something of type {type(made).__qualname__}, not a module.",
            where=getattr(factory, "__qualname__", repr(factory)),
            hint="let it return the nn.Module",
        )
    return made


_LOADING: ContextVar[str | None] = ContextVar("_LOADING", default=None)


@contextmanager
def executing(what: str) -> Iterator[None]:
    """A context in which a file or a module is executed for the model in it."""
    token = _LOADING.set(what)
    try:
        yield
    finally:
        _LOADING.reset(token)


def refuse_while_loading(function: str) -> None:
    """Raise in a script that is executed for the model in it: it would train again, and write its results again.

    Raises:
        SourceError: with what to change in the script.
    """
    if what := _LOADING.get():
        raise SourceError(
            f"{what} calls fxcollab.{function} while it is executed as a model's source",
            why="a source defines the model; what else it runs would run at every load, prune or verify",
            hint="move what the script runs under `if __name__ == '__main__':`, and what its model needs, such as a "
            "teacher, into the function that makes the model",
        )


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str | None = None) -> str | None:
    """A hint with the candidates that look like ``name``; without any, the other hint."""
    near = closest(name, candidates)
    return f"did you mean {near}?" if near else otherwise


@contextmanager
def user_code(what: str, folder: Path | None, module_name: str, hint: str | None = None) -> Iterator[None]:
    """Run a module's code with ``folder``, if any, on the import path; what it raises becomes a `SourceError`."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        yield
    except SourceError:
        raise
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        if hint is None and isinstance(error, SystemExit):
            hint = "move what the script runs under `if __name__ == '__main__':`"
        elif hint is None and isinstance(error, ImportError) and "relative import" in str(error):
            hint = "the file belongs to a package: name it as package.module:NAME"
        raise SourceError(what, where=_last_line(error, module_name), why=why, hint=hint) from error
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _last_line(error: BaseException, module_name: str) -> str | None:
    """The file and line of the innermost frame inside the module, or inside a package that holds it."""
    where = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if is_within(frame.f_globals.get("__name__", ""), module_name):
            where = f"{frame.f_code.co_filename}:{line}"
    return where


def is_within(package: str, module_name: str) -> bool:
    """Whether the module is the package, or lies in it."""
    return f"{module_name}.".startswith(f"{package}.")
