"""Proxies that record everything that a forward does with them.

On plain ``fx.Proxy`` the statement ``x += y`` becomes ``x = x + y``, ``x[i] = y`` raises, and a message such as
``f"expected 3, got {x.shape}"`` becomes a constant with the proxy's name in it.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from fxcollab.runtime.operators import INPLACE, set_data_
from fxcollab.tracing.callers import called_from_user_code, user_code_reads_class
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.leaks import watch
from fxcollab.tracing.queries import ProxyQueries

# A proxy formatted into a text leaves its node's name between two characters of Unicode's private use area.
_OPEN, _CLOSE = "\ue000", "\ue001"
_FORMATTED = re.compile(f"{_OPEN}([^{_CLOSE}:]*)(:[^{_CLOSE}]*)?{_CLOSE}")


class CaptureProxy(fx.Proxy):
    """The proxy of a capture; in user code it passes for the value that it stands for, where that is not a tensor."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __setattr__(self, name: str, value: Any) -> Any:
        """Record an assignment to an attribute of tensors; others are those of the proxy."""
        if not isinstance(getattr(Tensor, name, None), GetSetDescriptorType):
            return super().__setattr__(name, value)
        if name == "data":
            return self.tracer.create_proxy("call_function", set_data_, (self, value), {})
        if name == "requires_grad":
            return self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
        raise UntraceableError(f"{self.node.name}.{name} is assigned, which a graph can't record")

    __array_priority__ = 1000  # as tensors have it: numpy's numbers leave operations to them

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np  # not a dependency; only numpy itself calls this

        return np.asarray(_queries(self).numpy_value(self), dtype)

    def __copy__(self) -> Any:
        return self.tracer.create_proxy("call_function", copy.copy, (self,), {})

    def __deepcopy__(self, memo: Any) -> Any:
        return self.tracer.create_proxy("call_function", copy.deepcopy, (self,), {})

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __len__(self) -> int:
        return int(_queries(self).evaluate(self, "len"))

    def __int__(self) -> int:
        return int(_queries(self).evaluate(self, "int"))

    def __index__(self) -> int:
        return int(_queries(self).index(self))

    def __float__(self) -> float:
        return float(_queries(self).evaluate(self, "float"))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """In user code the class of the value, for ``match``, ``x.__class__`` and ``singledispatch``."""
        queries = _queries(self)
        return type(self) if queries.computing or not user_code_reads_class() else queries.type_of(self)

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__array_") or (_is_of_sizes(self) and not hasattr(torch.Size, k)):
            raise AttributeError(f"{self.node.name} has no {k!r}")  # numpy goes on without
        return None if _queries(self).attribute_is_none(self, k) else _CaptureAttribute(self, k)

    def __hash__(self) -> int:
        """In user code the hash of the value, unless it is a tensor: ``x.shape[-1] in {8, 16}``."""
        in_user_code = called_from_user_code() and not _queries(self).computing  # none are left after the trace
        value = _queries(self).plain_value(self, "a hash") if in_user_code else None
        return object.__hash__(self) if value is None else hash(value)

    def __str__(self) -> str:
        """In user code the text of the value, unless it is a tensor: ``str(x.dtype)``."""
        queries = _queries(self)
        in_user_code = called_from_user_code() and not queries.computing
        value = queries.plain_value(self, "a text") if in_user_code else None
        return str(value) if value is not None else f"{_OPEN}{self.node.name}{_CLOSE}"

    def __format__(self, format_spec: str) -> str:
        return f"{_OPEN}{self.node.name}{format_spec and f':{format_spec}'}{_CLOSE}"


class _CaptureAttribute(CaptureProxy, Attribute):
    """``x.shape`` and the like: recorded only when it is used as a value."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)
        self._grad_enabled = torch.is_grad_enabled()
        watch(self)  # not made by the tracer's `proxy`

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Recorded at the first use, in the grad mode in which the attribute was read."""
        with torch.set_grad_enabled(self._grad_enabled):
            node: fx.Node = Attribute.node.fget(self)  # type: ignore[attr-defined]
        return node

    __call__ = Attribute.__call__


def _is_of_sizes(proxy: fx.Proxy) -> bool:
    """Whether it is ``x.shape`` or a slice of it."""
    if isinstance(proxy, Attribute):
        return str(proxy.attr) == "shape"
    node = proxy.node
    while node.target is operator.getitem and isinstance(node.args[1], slice) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node is not proxy.node and node.target is getattr and str(node.args[1]) == "shape"


def _queries(proxy: fx.Proxy) -> ProxyQueries:
    queries: ProxyQueries = proxy.tracer.queries  # type: ignore[attr-defined]
    return queries


def _record_inplace(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name, _function in INPLACE.items():
    setattr(CaptureProxy, f"__{_name}__", _record_inplace(_function))


def unformat(text: str) -> tuple[str, list[str]]:
    """The template for ``str.format`` of a text with proxies in it, and the names of their nodes."""
    names = [match.group(1) for match in _FORMATTED.finditer(text)]
    if not names:
        return text, names
    literals = _FORMATTED.split(text)
    template = literals[0].replace("{", "{{").replace("}", "}}")
    for spec, literal in zip(literals[2::3], literals[3::3], strict=True):
        template += f"{{{spec or ''}}}" + literal.replace("{", "{{").replace("}", "}}")
    return template, names


def readable(text: str) -> str:
    """The text with plain node names in place of formatted proxies."""
    return _FORMATTED.sub(r"\1", text)
