"""Which numbers and texts in attributes of modules a traced forward reads: its graph has the values of the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxcollab.codegen.fixed import PLAIN

Reads = dict[tuple[str, str], None]
"""Paths of modules, each with the name of an attribute, in the order in which they are read."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def noted_reads(root: nn.Module, is_recording: Callable[[], bool]) -> Iterator[Reads]:
    """A context in which reads of such attributes of the modules in ``root`` are noted while it is recording."""
    paths = {id(module): path for path, module in reversed(list(root.named_modules()))}
    found: Reads = {}

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if type(value) in PLAIN and name not in _OF_EVERY_MODULE and id(module) in paths and is_recording():
            found[paths[id(module)], name] = None
        return value

    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        del nn.Module.__getattribute__


def values_of(root: nn.Module, reads: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """The values that these attributes have in ``root``, without those that are something else there."""
    values = {(path, name): vars(root.get_submodule(path)).get(name, root) for path, name in reads}
    return {key: value for key, value in values.items() if type(value) in PLAIN}
