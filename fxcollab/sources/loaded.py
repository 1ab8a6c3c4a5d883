"""What a source names, as a model and a factory of more like it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from fxcollab.errors import CaptureError, SourceError
from fxcollab.sources.source import Source
from fxcollab.sources.user_code import user_code

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


def loaded_from(source: Source, value: object, folder: Path, again: Callable[[], object] | None = None) -> Loaded:
    """The model which ``value`` is or makes; ``again`` gives the instance ``value`` a second time, anew."""
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
        raise SourceError(f"`{source.short}` is not a model", where=source.location, why=why)
    return Loaded(source, model, make and partial(_fresh, source, make, model))


def _fresh(source: Source, make: Make, first: nn.Module) -> nn.Module:
    model = make()
    if model is first:
        why = "every peer starts from a module of its own"
        hint = "build a new module on every call"
        raise SourceError(f"`{source.short}` gives the same module every time", why=why, hint=hint)
    return model


def build_from(source: Source, factory: Callable[..., object], folder: Path) -> nn.Module:
    """Call ``factory`` with the source's arguments; ``folder`` is importable meanwhile.

    Raises:
        SourceError: arguments are missing, the call failed, or it gave no module.
    """
    arguments = dict(source.arguments)
    if missing := missing_arguments(factory, arguments):
        hint = " ".join(f"--model-arg {name}=VALUE" for name in missing)
        what = f"`{source.short}` needs arguments: {', '.join(missing)}"
        raise SourceError(what, where=_defined_at(factory), hint=hint)
    with user_code(f"`{source.short}` failed to build its model", folder, factory.__module__):
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
    except (TypeError, ValueError):  # written in C: its call will tell
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
        CaptureError: it is neither.
    """
    return model if isinstance(model, nn.Module) else _made_by(model)


def _made_by(factory: Any) -> nn.Module:
    if not callable(factory):
        raise CaptureError(
            f"A {type(factory).__qualname__} is no model.", hint="give a module, or a function that makes one"
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"The factory returned a {type(model).__qualname__}, not a module.",
            where=getattr(factory, "__qualname__", repr(factory)),
            hint="let it return the nn.Module",
        )
    return model
