"""Which numbers and texts in attributes of modules a traced forward reads: its graph has the values of the trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxcollab.codegen.fixed import is_plain
from fxcollab.fx_utils import OF_EVERY_MODULE

Reads = dict[tuple[str, str], None]
"""Paths of modules, each with the name of an attribute, in the order in which they are read."""


@contextmanager
def noted_reads(root: nn.Module, is_recording: Callable[[], bool]) -> Iterator[Reads]:
    """A context in which reads of such attributes of the modules in ``root`` are noted while it is recording.

    Python looks them up without asking any method of ``nn.Module`` that could be wrapped; a subclass for each module
    would be another type to the forward. So ``nn.Module`` has a method more meanwhile, also for other threads, whose
    reads are not noted.
    """
    paths = {id(module): path for path, module in reversed(list(root.named_modules()))}
    found: Reads = {}

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if id(module) in paths and name not in OF_EVERY_MODULE and is_plain(value) and is_recording():
            found[paths[id(module)], name] = None
        return value

    before = vars(nn.Module).get("__getattribute__")
    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        del nn.Module.__getattribute__
        if before is not None:
            nn.Module.__getattribute__ = before  # type: ignore[method-assign]


def values_of(root: nn.Module, reads: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """The values that these attributes have, of modules and their classes; not what properties compute."""
    found = {}
    for path, name in reads:
        module = root.get_submodule(path)
        value = vars(module).get(name, inspect.getattr_static(type(module), name, module))
        if is_plain(value):
            found[path, name] = value
    return found
