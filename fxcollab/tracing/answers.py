"""Answers to what a forward asks of a proxy: what only the value that it stands for can tell."""

from __future__ import annotations

import operator
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from fxcollab._torch import FakeTensor
from fxcollab.runtime.operators import QUESTIONS, guard
from fxcollab.tracing.callers import calling_line, is_helper
from fxcollab.tracing.errors import NoExampleError, UntraceableError
from fxcollab.tracing.example_values import ExampleValues
from fxcollab.tracing.interface import Interface

Record = Callable[[Any, tuple[Any, ...]], fx.Proxy]

_CONTAINERS = (tuple, list, dict, KeysView, ValuesView, ItemsView)
_PARTS = (operator.getitem, getattr, list)
_A_TENSOR = torch.empty(0, device="meta")


class Answers:
    """Answers by an example, for one trace.

    Args:
        interface: the inputs of the graph.
        example_values: what its nodes are for the example; None where there is no example, or none is needed yet.
        tensors: those that ``get_attr`` nodes name.
        record: adds a call of a function to the graph.
        notes: gets a sentence for every line that asked for more than a type.
    """

    def __init__(
        self,
        interface: Interface,
        example_values: ExampleValues | None,
        tensors: Mapping[str, Tensor],
        record: Record,
        notes: dict[str, None],
    ) -> None:
        self._structured = frozenset(interface.structured)
        self._example_values, self._tensors, self._record, self._notes = example_values, tensors, record, notes
        self._evaluating = False

    @property
    def evaluating(self) -> bool:
        """Whether an example is being computed: nothing is recorded then."""
        return self._evaluating

    def ask(self, proxy: fx.Proxy, question: str) -> Any:
        """The answer to one of `QUESTIONS`, for the example.

        The graph refuses inputs for which the answer is another.

        Raises:
            UntraceableError: there is no example, or every input has an answer of its own.
        """
        asked = f"{question}({proxy.node.name})"
        value = self._example_of(proxy, asked, UntraceableError)
        try:
            answer = QUESTIONS[question](value)
        except (RuntimeError, TypeError) as error:
            raise UntraceableError(f"{asked} depends on the data: {error}") from error
        by_data = self._example_values is not None and self._example_values.real
        if by_data and isinstance(answer, float):
            raise UntraceableError(f"{asked} depends on the data, and every input has another")
        if (
            question in ("len", "keys", "bool")
            and isinstance(value, _CONTAINERS)
            and not by_data
            and not self._is_of_a_structured_input(proxy.node)
        ):
            return answer  # how many values a module returns, say
        file, module, line = calling_line()
        self._record(guard, (question, proxy, answer, f"{module}:{line}"))
        asked_at = f"what {file}:{line} asks was decided for an example input"
        self._notes[f"{asked_at}; others that answer differently are refused"] = None
        return answer

    def type_is(self, proxy: fx.Proxy, kinds: Any) -> bool:
        """Whether the example's value is an instance of ``kinds``; inputs are tensors where nothing says otherwise.

        Raises:
            UntraceableError: there is no example.
        """
        with_elements = _tells_element_types(kinds)
        value = self._instance(proxy, with_elements)
        if with_elements and isinstance(value, Tensor):
            with self._unrecorded():
                value = torch.empty(0, dtype=value.dtype, device=value.device)  # fake ones have no such type
        return isinstance(value, kinds)

    def type_of(self, proxy: fx.Proxy) -> type:
        """The type of the example's value.

        Raises:
            UntraceableError: there is no example.
        """
        value = self._instance(proxy)
        return Tensor if isinstance(value, FakeTensor) else type(value)

    def is_callable(self, proxy: fx.Proxy) -> bool:
        """Whether the example's value can be called.

        Raises:
            UntraceableError: there is no example.
        """
        return callable(self._instance(proxy))

    def has_attribute(self, proxy: fx.Proxy, name: str) -> bool:
        """Whether the example's value has an attribute of that name.

        Raises:
            UntraceableError: there is no example.
        """
        return hasattr(self._instance(proxy), name)

    def numbers(self, proxy: fx.Proxy) -> Any:
        """The example's size or sizes, for numpy.

        Raises:
            UntraceableError: there is no example, or the value is no number.
        """
        value = self._example_of(proxy, f"what numpy asks of {proxy.node.name!r}", UntraceableError)
        if not isinstance(value, int | float | torch.Size):
            raise UntraceableError(f"numpy computes with {proxy.node.name!r}, which a graph can't hold")
        return self.ask(proxy, "value")

    def plain_value(self, proxy: fx.Proxy, what: str) -> Any:
        """The example's value of what is no tensor, such as a size or a dtype; None for a tensor.

        Raises:
            UntraceableError: there is no example.
        """
        if self._is_surely_a_tensor(proxy.node) or isinstance(self._example_of(proxy, what), Tensor):
            return None
        return self.ask(proxy, "value")

    def iterate(self, proxy: fx.Proxy) -> Iterator[Any]:
        """The parts of the example's value, as proxies; keys as they are.

        Raises:
            UntraceableError: there is no example.
        """
        value = self._example_of(proxy, f"iter({proxy.node.name})", UntraceableError)
        if isinstance(value, dict | KeysView):
            return iter(self.ask(proxy, "keys"))
        if isinstance(value, ItemsView):
            keys = self.ask(proxy, "keys")
            listed: Any = self._record(list, (proxy,))
            return ((key, listed[i][1]) for i, key in enumerate(keys))
        if isinstance(value, ValuesView):
            return iter(self._record(list, (proxy,)))
        return (operator.getitem(proxy, i) for i in range(self.ask(proxy, "len")))

    def keys(self, proxy: fx.Proxy) -> list[Any] | None:
        """The keys of the example's value; None where it is no dict, or not known."""
        value = self._example_of(proxy, f"keys of {proxy.node.name!r}") if self._example_values else None
        return list(self.ask(proxy, "keys")) if isinstance(value, dict) else None

    def is_none(self, proxy: fx.Proxy) -> bool:
        """Whether the example's value is None: ``if mask is None`` can't be asked of a proxy."""
        if self._example_values is None or not may_be_none(proxy.node):
            return False
        return self._example_of(proxy, f"whether {proxy.node.name!r} is None") is None

    def attribute_is_none(self, owner: fx.Proxy, name: str) -> bool:
        """Whether an attribute of the example's value is None, as a field of what a module returns may be."""
        if self._unanswerable:
            return False
        value = self._example_of(owner, f"{owner.node.name}.{name}")
        return not isinstance(value, Tensor) and hasattr(value, name) and getattr(value, name) is None

    def holders(self, proxy: fx.Proxy) -> tuple[str, ...] | None:
        """The nodes in whose values the example's list or dict is found; None for a tensor, or if not known."""
        if self._unanswerable:
            return None
        found: tuple[str, ...] | None = self._computed(lambda example_values: example_values.holders(proxy.node))
        return found

    def copies(self, index: Any) -> bool:
        """Whether ``x[index]`` is seen to be new storage: a tensor of several places among the index, or a list."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, list) for part in parts):
            return True
        if self._unanswerable:
            return False
        proxies = [part for part in parts if isinstance(part, fx.Proxy)]
        values = [self._example_of(proxy, proxy.node.name) for proxy in proxies]
        return any(isinstance(value, Tensor) and (value.ndim or value.dtype == torch.bool) for value in values)

    def _is_of_a_structured_input(self, node: fx.Node) -> bool:
        """Whether it is a part of an input that is a list, a dict or the like."""
        while node.op != "placeholder" and (node.target in _PARTS or node.op == "call_method"):
            node = node.all_input_nodes[0]
        return node.op == "placeholder" and node.target in self._structured

    def _is_surely_a_tensor(self, node: fx.Node) -> bool:
        """Whether it is an input, of which no example is at hand and no structure known."""
        return self._example_values is None and node.op == "placeholder" and node.target not in self._structured

    @property
    def _unanswerable(self) -> bool:
        """Whether no example can be asked: there is none, or its values are just being computed."""
        return self._example_values is None or self._evaluating

    def _instance(self, proxy: fx.Proxy, with_elements: bool = False) -> Any:
        """A value of the type that ``proxy`` stands for; ``with_elements``: whose elements have its type, too."""
        if not with_elements and self._is_surely_a_tensor(proxy.node):
            return _A_TENSOR
        if proxy.node.op == "get_attr":
            return self._tensors[str(proxy.node.target)]
        return self._example_of(proxy, f"the type of {proxy.node.name!r}")

    def _example_of(self, proxy: fx.Proxy, what: str, refusal: type[UntraceableError] = NoExampleError) -> Any:
        if self._unanswerable:
            raise refusal(f"{what} can't be known while tracing")
        return self._computed(lambda example_values: example_values.value(proxy.node))

    def _computed(self, answer: Callable[[ExampleValues], Any]) -> Any:
        assert self._example_values is not None
        with self._unrecorded():
            return answer(self._example_values)

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False


def _tells_element_types(kinds: Any) -> bool:
    """Whether ``torch.FloatTensor`` or one like it is among ``kinds``."""
    return any(
        isinstance(kind, type(torch.FloatTensor)) for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
    )


def may_be_none(node: fx.Node) -> bool:
    """Whether a node's value can be None where that of a tensor operation can't: a part, or what a helper returns."""
    if node.op == "call_method":
        return node.target in ("get", "pop")
    return node.op == "call_function" and (node.target is operator.getitem or is_helper(node.target))
