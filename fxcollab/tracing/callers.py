"""Whose code is running: the user's, or that of Python, torch and this library."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import sys
import traceback
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from fxcollab.sources.source import FILE_MODULE

_LIBRARIES = sys.stdlib_module_names | {"torch", "fxcollab", "fxcollab_cli", "numpy", "functorch", "triton", "sympy"}


Place: TypeAlias = tuple[str, str, int, int]
"""An instruction: module, function, its first line, and the offset in its code."""


def calling_place() -> Place:
    """The instruction of the innermost user code that is running."""
    frames = [frame for frame, _ in traceback.walk_stack(None)]
    frame = next((frame for frame in frames if not is_library_frame(frame)), frames[-1])
    code = frame.f_code
    return frame.f_globals.get("__name__", "?"), code.co_qualname, code.co_firstlineno, frame.f_lasti


def calling_line() -> tuple[str, str, int]:
    """File, module and line of the innermost user code; a file that was loaded as a source is its own module."""
    for frame, line in traceback.walk_stack(None):
        file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "?")
        if not is_internal_file(file):
            return file, Path(file).name if module.startswith(FILE_MODULE) else module, line
    return "an unknown file", "?", 0


def calling_lines(outermost: CodeType) -> str:
    """The lines of user code that are running, as in a traceback, up to a call of ``outermost``."""
    inside = takewhile(lambda step: step[0].f_code is not outermost, traceback.walk_stack(None))
    steps = [step for step in inside if not is_internal_file(step[0].f_code.co_filename)]
    return "".join(traceback.StackSummary.extract(reversed(steps)).format()).strip()


def user_code_reads_class() -> bool:
    """Whether user code, or ``singledispatch`` for it, reads ``x.__class__`` or matches a class, two calls up.

    C code reads it too, and relies on the real class.
    """
    frame: FrameType | None = sys._getframe(2)
    assert frame is not None
    in_functools = frame.f_globals.get("__name__") == "functools"
    if not in_functools and is_library_frame(frame):
        return False
    if _instruction(frame.f_code, frame.f_lasti) not in (("MATCH_CLASS", None), ("LOAD_ATTR", "__class__")):
        return False
    while frame is not None and frame.f_globals.get("__name__") == "functools":
        frame = frame.f_back
    return frame is not None and not is_library_frame(frame)


def called_from_user_code() -> bool:
    """Whether the code two calls up is the user's."""
    return not is_library_frame(sys._getframe(2))


def is_library_frame(frame: FrameType) -> bool:
    """Whether the code of Python, torch, numpy or this library is running in a frame."""
    return _is_library(frame.f_globals.get("__name__", "builtins"))


@functools.lru_cache(1024)
def _instruction(code: CodeType, offset: int) -> tuple[str, str | None]:
    """The name of the instruction that runs, and the attribute that it loads."""
    found = next(i for i in dis.get_instructions(code) if i.offset == offset)
    return found.opname, found.argval if found.opname == "LOAD_ATTR" else None


@functools.cache
def is_internal_file(file: str) -> bool:
    """Whether ``file`` belongs to torch.fx, torch's dispatch, numpy or this library, none of which has models."""
    torch_root, own_root = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
    inner = ("fx", "nn/modules/module", "overrides", "_", "autograd", "utils/_")
    numpy = getattr(sys.modules.get("numpy"), "__file__", None)
    others = [f"{Path(numpy).parent}/"] if numpy else []
    return file.startswith((f"{own_root}/", *others, *(f"{torch_root}/{part}" for part in inner)))


def user_scopes(root: nn.Module) -> Iterator[dict[str, Any]]:
    """The globals of all user code: of loaded modules, and of forwards whose module isn't in ``sys.modules``."""
    yield from loaded_scopes(besides={name for name in list(sys.modules) if _is_library(name)})
    classes = {cls for module in root.modules() for cls in type(module).__mro__ if not _is_library(cls.__module__)}
    forwards = (inspect.unwrap(vars(cls)["forward"]) for cls in classes if "forward" in vars(cls))
    yield from (function.__globals__ for function in forwards if isinstance(function, FunctionType))


def loaded_scopes(besides: Container[str] = ()) -> list[dict[str, Any]]:
    """The globals of all loaded modules whose names are not in ``besides``."""
    loaded = list(sys.modules.items())
    return [vars(one) for name, one in loaded if name not in besides and isinstance(one, ModuleType)]


@contextmanager
def replaced(places: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """A context in which attributes of objects, or entries of dicts, have other values."""
    with ExitStack() as restored:
        for owner, name, value in places:
            entries, put = (owner, operator.setitem) if isinstance(owner, dict) else (vars(owner), setattr)
            restored.callback(put, owner, name, entries[name])
            put(owner, name, value)
        yield


def _is_library(name: str) -> bool:
    package = name.partition(".")[0]
    return package in _LIBRARIES and package != "__main__"
