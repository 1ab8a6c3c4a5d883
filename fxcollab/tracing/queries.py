"""Queries about proxies that only concrete values can answer: they are answered by example values."""

from __future__ import annotations

import operator
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxcollab._torch import FakeTensor, pytree
from fxcollab.runtime.operators import QUESTIONS, guard
from fxcollab.tracing.callers import Place, calling_line, calling_place
from fxcollab.tracing.errors import DrawnError, IndexAskedError, NoExampleError, UntraceableError
from fxcollab.tracing.example_values import ExampleValues
from fxcollab.tracing.helpers import is_helper
from fxcollab.tracing.interface import Interface

Record = Callable[[Any, tuple[Any, ...]], fx.Proxy]

_CONTAINERS = (tuple, list, dict, KeysView, ValuesView, ItemsView)
_PARTS = (operator.getitem, getattr, list)
_A_TENSOR = torch.empty(0, device="meta")


MOST_PLACES = 100
"""With more of them, as where a forward makes code with new names at every call, all indices are given."""


@dataclass
class Indices:
    """Where a proxy that is asked for an index gives one.

    Torch asks every size that it is given, and takes a proxy that has no index as it is: so the size may differ at
    every call. Python's own questions, as by ``range``, fail then; only where one has is it answered the next time.

    Attributes:
        answered: the places where one is given.
        refused: the last place where none was given.
    """

    answered: set[Place] = field(default_factory=set)
    refused: Place | None = None


class ProxyQueries:
    """Queries about the proxies of one trace, answered by ``example_values``, which may be None.

    A method that needs an example value and has none raises an `UntraceableError`. ``tensors`` has those of the
    ``get_attr`` nodes by name; ``record`` adds a call to the graph; ``notes`` gets a sentence for every guarded line.
    ``indices`` says where indices are given.
    """

    def __init__(
        self,
        interface: Interface,
        example_values: ExampleValues | None,
        tensors: Mapping[str, Tensor],
        record: Record,
        notes: dict[str, None],
        indices: Indices,
    ) -> None:
        self._structured = frozenset(interface.structured)
        self._example_values, self._tensors, self._record, self._notes = example_values, tensors, record, notes
        self._indices, self._computing = indices, False

    @property
    def computing(self) -> bool:
        """Whether example values are being computed: nothing is recorded then."""
        return self._computing

    def evaluate(self, proxy: fx.Proxy, question: str) -> Any:
        """One of `QUESTIONS` on the example value; a guard in the graph raises for inputs with another answer."""
        call = f"{question}({proxy.node.name})"
        value = self._example_value(proxy, call, UntraceableError)
        try:
            answer = QUESTIONS[question](value)
        except (RuntimeError, TypeError) as error:
            raise UntraceableError(f"{call} depends on the data: {error}") from error
        by_data = self._example_values is not None and self._example_values.real
        with self.not_recording():
            drawn = self._example_values is not None and self._example_values.drawn(proxy.node, QUESTIONS[question])
        if drawn:
            raise DrawnError(f"{call} depends on random numbers that the forward draws, anew at every call")
        if by_data and isinstance(answer, float):
            raise UntraceableError(f"{call} depends on the data, and differs for every input")
        if (
            question in ("len", "keys", "bool")
            and isinstance(value, _CONTAINERS)
            and not by_data
            and not self._is_of_a_structured_input(proxy.node)
            and not comes_from_helper(proxy.node)
        ):
            return answer  # needs no guard: the number of values that a module returns, for example
        file, module, line = calling_line()
        if proxy.node.target is getattr and proxy.node.args[1] == "requires_grad":
            question = "requires grad"
        self._record(guard, (question, proxy, answer, f"{module}:{line}"))
        if question == "requires grad" and answer:
            self._notes[f"{file}:{line} goes the same way whether a tensor requires grad or not"] = None
            return answer
        traced = f"what {file}:{line} depends on was taken from an example input"
        self._notes[f"{traced}; inputs for which it differs raise an error"] = None
        return answer

    def index(self, proxy: fx.Proxy) -> Any:
        """The index that the example value is, where `Indices` says so."""
        place = calling_place()
        if place not in self._indices.answered and len(self._indices.answered) < MOST_PLACES:
            self._indices.refused = place
            raise IndexAskedError(proxy.node.name, place)
        return self.evaluate(proxy, "index")

    def is_instance(self, proxy: fx.Proxy, classes: Any) -> bool:
        """``isinstance`` of the example value; inputs without an example are tensors."""
        with_dtype = any(
            isinstance(cls, type(torch.FloatTensor))
            for cls in (classes if isinstance(classes, tuple) else (classes,))
        )
        value = self.value_of_type(proxy, with_dtype)
        if with_dtype and isinstance(value, Tensor):
            with self.not_recording():
                value = torch.empty(0, dtype=value.dtype, device=value.device)  # a fake one is no FloatTensor
        return isinstance(value, classes)

    def values_of_types(self, value: Any) -> Any:
        """A value with values of the proxies' types in their place."""
        return value if self._computing else pytree.tree_map_only(fx.Proxy, self.value_of_type, value)

    def type_of(self, proxy: fx.Proxy) -> type:
        """The type of the example value."""
        value = self.value_of_type(proxy)
        return Tensor if isinstance(value, FakeTensor) else type(value)

    def value_of_type(self, proxy: fx.Proxy, with_dtype: bool = False) -> Any:
        """A value of the proxy's type, and ``with_dtype`` also of its dtype."""
        if not with_dtype and self._is_unstructured_input(proxy.node):
            return _A_TENSOR
        if proxy.node.target in self._tensors:
            return self._tensors[str(proxy.node.target)]
        return self._example_value(proxy, f"the type of {proxy.node.name!r}")

    def numpy_value(self, proxy: fx.Proxy) -> Any:
        """The example's size or sizes, for numpy."""
        value = self._example_value(proxy, f"the value of {proxy.node.name!r} for numpy", UntraceableError)
        if not isinstance(value, int | float | torch.Size):
            raise UntraceableError(f"numpy computes with {proxy.node.name!r}, which a graph can't record")
        return self.evaluate(proxy, "value")

    def plain_value(self, proxy: fx.Proxy, what: str) -> Any:
        """The example value if it is not a tensor, but a size or a dtype, for example; None for a tensor."""
        if self._is_unstructured_input(proxy.node) or isinstance(self._example_value(proxy, what), Tensor):
            return None
        return self.evaluate(proxy, "value")

    def iterate(self, proxy: fx.Proxy) -> Iterator[Any]:
        """The members of the example value as proxies; keys as they are."""
        value = self._example_value(proxy, f"iter({proxy.node.name})", UntraceableError)
        if isinstance(value, dict | KeysView):
            return iter(self.evaluate(proxy, "keys"))
        if isinstance(value, ItemsView):
            keys = self.evaluate(proxy, "keys")
            listed: Any = self._record(list, (proxy,))
            return ((key, listed[i][1]) for i, key in enumerate(keys))
        if isinstance(value, ValuesView):
            return iter(self._record(list, (proxy,)))
        return (operator.getitem(proxy, i) for i in range(self.evaluate(proxy, "len")))

    def keys(self, proxy: fx.Proxy) -> list[Any] | None:
        """The keys of the example value; None if it is not a dict, or there is no example."""
        value = self._example_value(proxy, f"keys of {proxy.node.name!r}") if self._example_values else None
        return list(self.evaluate(proxy, "keys")) if isinstance(value, dict) else None

    def is_none(self, proxy: fx.Proxy) -> bool:
        """Whether the example value is None; False if there is no example."""
        if self._example_values is None or not may_be_none(proxy.node):
            return False
        return self._example_value(proxy, f"whether {proxy.node.name!r} is None") is None

    def attribute_is_none(self, owner: fx.Proxy, name: str) -> bool:
        """Whether an attribute of the example value is None, as a field of what a module returns may be."""
        if self._unavailable:
            return False
        value = self._example_value(owner, f"{owner.node.name}.{name}")
        return not isinstance(value, Tensor) and hasattr(value, name) and getattr(value, name) is None

    def _is_of_a_structured_input(self, node: fx.Node) -> bool:
        """Whether the node is a structured input, or a part of one."""
        while node.op != "placeholder" and (node.target in _PARTS or node.op == "call_method"):
            node = node.all_input_nodes[0]
        return node.op == "placeholder" and node.target in self._structured

    def _is_unstructured_input(self, node: fx.Node) -> bool:
        """Whether the node is an input without an example, so a tensor as far as is known."""
        return self._example_values is None and node.op == "placeholder" and node.target not in self._structured

    @property
    def _unavailable(self) -> bool:
        """Whether there are no example values, or they are being computed just now."""
        return self._example_values is None or self._computing

    def _example_value(self, proxy: fx.Proxy, what: str, error: type[UntraceableError] = NoExampleError) -> Any:
        if self._example_values is None or self._computing:
            raise error(f"{what} can't be known while tracing")
        with self.not_recording():
            return self._example_values.value(proxy.node)

    @contextmanager
    def not_recording(self) -> Iterator[None]:
        """A context in which nothing is recorded."""
        self._computing = True
        try:
            yield
        finally:
            self._computing = False


def comes_from_helper(node: fx.Node) -> bool:
    """Whether a node is what a helper returns, or a part of it."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "call_function" and is_helper(node.target)


def may_be_none(node: fx.Node) -> bool:
    """Whether a node can be None, unlike tensor operations: a part of a value, or what a helper returns."""
    if node.op == "call_method":
        return node.target in ("get", "pop")
    return node.op == "call_function" and (node.target is operator.getitem or is_helper(node.target))
