"""Whose code is running: the author's of a model, or that of Python, torch and this library."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

_STANDARD = sys.stdlib_module_names | {"torch", "fxcollab", "fxcollab_cli", "numpy", "functorch", "triton", "sympy"}


def calling_line() -> tuple[str, str, int]:
    """File, module and line of the author's code that is running."""
    for frame, line in traceback.walk_stack(None):
        if not belongs_to_the_machinery(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_globals.get("__name__", "?"), line
    return "an unknown file", "?", 0


def calling_lines(outermost: CodeType) -> str:
    """The lines of the author's code that are running, as in a traceback, up to a call of ``outermost``."""
    inside = takewhile(lambda step: step[0].f_code is not outermost, traceback.walk_stack(None))
    steps = [step for step in inside if not belongs_to_the_machinery(step[0].f_code.co_filename)]
    return "".join(traceback.StackSummary.extract(reversed(steps)).format()).strip()


def author_asks_for_the_class() -> bool:
    """Whether an author's code, or ``singledispatch`` for it, reads ``x.__class__`` or matches a class, two calls up.

    C code asks as well, and would take what it is told for the truth.
    """
    frame: FrameType | None = sys._getframe(2)
    assert frame is not None
    asks_for_others = frame.f_globals.get("__name__") == "functools"
    if not asks_for_others and _is_standard_frame(frame):
        return False
    if _instruction(frame.f_code, frame.f_lasti) not in (("MATCH_CLASS", None), ("LOAD_ATTR", "__class__")):
        return False
    while frame is not None and frame.f_globals.get("__name__") == "functools":
        frame = frame.f_back
    return frame is not None and not _is_standard_frame(frame)


def author_asks() -> bool:
    """Whether an author's code, and no machinery, runs two calls up."""
    return not _is_standard_frame(sys._getframe(2))


def _is_standard_frame(frame: FrameType) -> bool:
    return _is_standard(frame.f_globals.get("__name__", "builtins"))


@functools.lru_cache(1024)
def _instruction(code: CodeType, offset: int) -> tuple[str, str | None]:
    """Name and, of an attribute's, argument of the instruction that runs."""
    found = next(i for i in dis.get_instructions(code) if i.offset == offset)
    return found.opname, found.argval if found.opname == "LOAD_ATTR" else None


@functools.cache
def belongs_to_the_machinery(file: str) -> bool:
    """Whether ``file`` is of torch.fx, of torch's dispatch, of numpy, or of this library, and no one's model."""
    torch_root, own_root = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
    inner = ("fx", "nn/modules/module", "overrides", "_", "autograd", "utils/_")
    numpy = getattr(sys.modules.get("numpy"), "__file__", None)
    others = [f"{Path(numpy).parent}/"] if numpy else []
    return file.startswith((f"{own_root}/", *others, *(f"{torch_root}/{part}" for part in inner)))


def scopes(root: nn.Module) -> Iterator[dict[str, Any]]:
    """The globals of all code that is neither Python's nor torch's, and of the forwards in no loaded module."""
    foreign = {cls for module in root.modules() for cls in type(module).__mro__ if not _is_standard(cls.__module__)}
    yield from loaded_scopes().foreign
    forwards = (inspect.unwrap(vars(cls)["forward"]) for cls in foreign if "forward" in vars(cls))
    yield from (function.__globals__ for function in forwards if isinstance(function, FunctionType))


@dataclass(frozen=True, eq=False)
class LoadedScopes:
    """The globals of what is loaded.

    Attributes:
        modules: what is loaded, held so that ids stay theirs.
        all: the globals of every module.
        foreign: those of code that is neither Python's nor torch's.
    """

    modules: tuple[object, ...]
    all: tuple[dict[str, Any], ...]
    foreign: tuple[dict[str, Any], ...]


def loaded_scopes() -> LoadedScopes:
    """What is loaded now; gone through only where it is not what was loaded the last time."""
    return _scopes_of(tuple(map(id, sys.modules.values())))


@functools.lru_cache(1)
def _scopes_of(ids: tuple[int, ...]) -> LoadedScopes:
    loaded = list(sys.modules.items())
    modules = [(name, module) for name, module in loaded if isinstance(module, ModuleType)]
    return LoadedScopes(
        tuple(module for _, module in loaded),
        tuple(vars(module) for _, module in modules),
        tuple(vars(module) for name, module in modules if not _is_standard(name)),
    )


def is_helper(function: Any) -> bool:
    """Whether it is a plain function of an author's."""
    ours = ("torch", "fxcollab")
    return isinstance(function, FunctionType) and function.__module__.partition(".")[0] not in ours


def _is_standard(name: str) -> bool:
    package = name.partition(".")[0]
    return package in _STANDARD and package != "__main__"
