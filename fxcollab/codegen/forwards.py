"""The forward of a module that has several graphs: the first whose condition holds runs."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_HEADER = "def forward"


class Forward(NamedTuple):
    """The generated forward of one graph, and the condition under which it runs."""

    condition: str
    function: Callable[..., Any]
    code: str


def forward_of_modes(forwards: Sequence[Forward]) -> Callable[..., Any]:
    """A forward that takes the first one whose condition holds, with the same signature as the generated ones.

    It is made from source, because tracers read a forward's parameters from its code object.
    """
    code, first = forwards[0].code, forwards[0].function
    definition = code[code.index(_HEADER) :].split("\n", 1)[0]
    arguments = ", ".join(inspect.signature(first).parameters)
    lines = [f"    if {each.condition}:\n        return _{place}({arguments})" for place, each in enumerate(forwards)]
    scope = {**first.__globals__, **{f"_{place}": each.function for place, each in enumerate(forwards)}}
    source = "\n".join([definition, *lines])
    exec(compile(source, "<forward of both modes>", "exec", dont_inherit=True), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def code_of_modes(forwards: Sequence[Forward]) -> str:
    """The code of several generated forwards as that of one."""
    split = [each.code[each.code.index(_HEADER) :].rstrip().split("\n", 1) for each in forwards]
    keywords = ["if", *["elif"] * (len(forwards) - 2), "else"]
    heads = [f"{word} {each.condition}" for word, each in zip(keywords[:-1], forwards, strict=False)] + ["else"]
    bodies = [f"    {head}:\n{textwrap.indent(body, '    ')}" for head, (_, body) in zip(heads, split, strict=True)]
    return "\n".join([f"\n{split[0][0]}", *bodies])
