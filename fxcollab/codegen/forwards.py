"""The generated forwards of both modes become one that asks which mode it is."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any


def dispatch(definition: str, train: Callable[..., Any], evaluation: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that asks ``self.training``, under the very signature of the generated ones.

    It is made from source: tracers read a forward's parameters off its code object.
    """
    arguments = ", ".join(inspect.signature(train).parameters)
    source = f"{definition}\n    return (_train if self.training else _eval)({arguments})"
    scope = {**train.__globals__, "_train": train, "_eval": evaluation}
    exec(compile(source, "<forward of both modes>", "exec", dont_inherit=True), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def merge(train: str, evaluation: str) -> str:
    """Both generated forwards as one text."""
    (head, train_body), (_, eval_body) = (code.split("\n", 1) for code in definitions(train, evaluation))
    bodies = [textwrap.indent(body, "    ") for body in (train_body, eval_body)]
    return f"\n{head}\n    if self.training:\n{bodies[0]}\n    else:\n{bodies[1]}"


def definitions(*codes: str) -> Iterator[str]:
    """Each generated code from its forward on."""
    return (code[code.index("def forward") :].rstrip() for code in codes)
