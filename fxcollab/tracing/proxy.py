"""Proxies that lose nothing of what a forward does with them.

On plain ``fx.Proxy`` the statement ``x += y`` becomes ``x = x + y``, ``x[i] = y`` is refused, and a message such as
``f"expected 3, got {x.shape}"`` is frozen with the proxy's name in it. Here each of them is recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Attribute

from fxcollab.runtime.operators import INPLACE
from fxcollab.tracing.answers import Answers
from fxcollab.tracing.callers import author_asks, author_asks_for_the_class

# A proxy formatted into a text leaves its node's name between two characters of Unicode's private use area.
_OPEN, _CLOSE = "\ue000", "\ue001"
_FORMATTED = re.compile(f"{_OPEN}([^{_CLOSE}:]*)(:[^{_CLOSE}]*)?{_CLOSE}")


class CaptureProxy(fx.Proxy):
    """The proxy of a capture."""

    def __setitem__(self, key: Any, value: Any) -> None:
        record: Callable[..., None] = self.tracer.set_item  # type: ignore[attr-defined]
        record(self, key, value)

    __array_priority__ = 1000  # as tensors have it: numpy's numbers leave operations to them

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np  # no dependency of ours: who asks has it

        return np.asarray(_answers(self).numbers(self), dtype)

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __int__(self) -> int:
        return int(self._ask("int"))

    def __index__(self) -> int:
        return int(self._ask("index"))

    def __float__(self) -> float:
        return float(self._ask("float"))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """For authors' code what it stands for: ``match``, ``x.__class__`` and ``singledispatch`` ask here."""
        answers = _answers(self)
        return type(self) if answers.evaluating or not author_asks_for_the_class() else answers.type_of(self)

    def _ask(self, question: str) -> Any:
        return _answers(self).ask(self, question)

    def __getattr__(self, k: str) -> Any:
        of_a_shape = isinstance(self, Attribute) and self.attr == "shape"
        if k.startswith("__array_") or (of_a_shape and not hasattr(torch.Size, k)):
            raise AttributeError(f"{self.node.name} has no {k!r}")  # numpy asks for them, and goes on without
        return None if _answers(self).attribute_is_none(self, k) else _CaptureAttribute(self, k)

    def __hash__(self) -> int:
        """In authors' code that of the value it stands for, where that is no tensor: ``x.shape[-1] in {8, 16}``."""
        answers = _answers(self)
        value = answers.plain_value(self, "a hash") if author_asks() and not answers.evaluating else None
        return object.__hash__(self) if value is None else hash(value)

    def __str__(self) -> str:
        """In authors' code that of the value it stands for, where that is no tensor: ``str(x.dtype)``."""
        answers = _answers(self)
        value = answers.plain_value(self, "a text") if author_asks() and not answers.evaluating else None
        return str(value) if value is not None else f"{_OPEN}{self.node.name}{_CLOSE}"

    def __format__(self, format_spec: str) -> str:
        return f"{_OPEN}{self.node.name}{format_spec and f':{format_spec}'}{_CLOSE}"


class _CaptureAttribute(CaptureProxy, Attribute):
    """``x.shape`` and the like: a node only where it is used as a value."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)
        self._recorded = torch.is_grad_enabled()
        self.tracer.remember(self)  # type: ignore[attr-defined]  # fx makes it without asking the tracer

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Made when it is first used, as if where the attribute was read: ``x.real`` under ``no_grad``, say."""
        with torch.set_grad_enabled(self._recorded):
            node: fx.Node = Attribute.node.fget(self)  # type: ignore[attr-defined]
        return node

    __call__ = Attribute.__call__


def _answers(proxy: fx.Proxy) -> Answers:
    answers: Answers = proxy.tracer.answers  # type: ignore[attr-defined]
    return answers


def _record_inplace(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name, _function in INPLACE.items():
    setattr(CaptureProxy, f"__{_name}__", _record_inplace(_function))


def unformat(text: str) -> tuple[str, list[str]]:
    """A text with proxies in it as a template for ``str.format``, and the names of their nodes."""
    names = [match.group(1) for match in _FORMATTED.finditer(text)]
    if not names:
        return text, names
    literals = _FORMATTED.split(text)
    template = literals[0].replace("{", "{{").replace("}", "}}")
    for spec, literal in zip(literals[2::3], literals[3::3], strict=True):
        template += f"{{{spec or ''}}}" + literal.replace("{", "{{").replace("}", "}}")
    return template, names


def readable(text: str) -> str:
    """A text without the marks of formatted proxies."""
    return _FORMATTED.sub(r"\1", text)
