"""The tracer: opens the modules it is told to and keeps every other one whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxcollab.capture.interface import Interface

RETURNED_BY = "fxcollab_returned_by"
"""Meta key: the calls (``path`` or ``path@k``) of opened modules that return this node's value."""

_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch, name)
    for name in (
        "arange", "bernoulli", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
        "randint", "randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
    )
)  # fmt: skip


class LazyTracer(fx.Tracer):
    """A symbolic tracer that never writes to the model it traces.

    Unlike ``fx.Tracer`` it records tensor factories (``torch.rand``, ``arange``) as nodes instead of freezing
    what they return, reads buffers as nodes so that counting in place happens at every call, keeps constants
    to itself instead of setting them on the model, and looks state up in constant time.

    Args:
        opened: paths of the modules to trace into.
        interface: which arguments become placeholders.
        operators: also trace into whatever plain fx would, down to operations and torch's own layers.
        constants: those of the other mode's graph; equal ones keep their names.
    """

    proxy_buffer_attributes = True
    record_stack_traces = True

    def __init__(
        self,
        opened: frozenset[str],
        interface: Interface,
        *,
        operators: bool = False,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._opened, self._interface, self._operators = opened, interface, operators
        self.constants: dict[str, Tensor] = dict(constants or {})

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace ``root``; see ``fx.Tracer.trace``."""
        self._state = {id(tensor): name for name, tensor in _state_by_name(root)}
        self._constant_names: dict[int, str] = {}
        with _RecordFactories(self):
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep ``m`` whole unless it is to be opened."""
        if module_qualified_name in self._opened:
            return False
        return super().is_leaf_module(m, module_qualified_name) if self._operators else True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call, and for an opened module which value it returned."""
        path = self.path_of_module(m)
        calls = self.num_calls.get(path, 0) + 1
        value = super().call_module(m, forward, args, kwargs)
        if isinstance(value, fx.Proxy):
            call = path if calls == 1 else f"{path}@{calls}"
            value.node.meta.setdefault(RETURNED_BY, []).append(call)
        return value

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Parameters and buffers become nodes, one for each tensor."""
        name = self._state.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Tensors become nodes: state under its own name, constants under names kept by the tracer."""
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        name = self._state.get(id(a)) or self._constant_names.get(id(a))
        if name is None:
            name = self._constant_names[id(a)] = self._name_constant(a)
            self.constants[name] = a
        return self.create_node("get_attr", name, (), {})

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the inputs; what is fixed keeps its default."""
        signature = inspect.signature(self.root.forward)
        annotations = getattr(inspect.unwrap(root_fn), "__annotations__", {})
        inputs = {
            name: self.create_proxy(
                "placeholder",
                name,
                _default(signature.parameters[name]),
                {},
                type_expr=annotations.get(name),
            )
            for name in self._interface.inputs
        }

        def forward() -> Any:
            positional, keywords = _as_call(signature, inputs)
            return root_fn(self.root, *positional, **keywords)

        forward.__annotations__ = {k: v for k, v in annotations.items() if k == "return"}
        return forward, []

    def _name_constant(self, constant: Tensor) -> str:
        used = set(self._constant_names.values())
        for name, known in self.constants.items():
            if name not in used and known.dtype == constant.dtype and torch.equal(known, constant):
                return name
        count = len(self.constants)
        while hasattr(self.root, f"_tensor_constant{count}"):
            count += 1
        return f"_tensor_constant{count}"


class _RecordFactories(TorchFunctionMode):
    """While tracing, a call such as ``torch.rand(3)`` becomes a node."""

    def __init__(self, tracer: LazyTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _state_by_name(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor reachable as an attribute; registered state last, so that its names win."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        yield from ((prefix + k, v) for k, v in module.__dict__.items() if isinstance(v, Tensor))
    yield from reversed(list(root.named_buffers()))
    yield from reversed(list(root.named_parameters()))


def _default(parameter: inspect.Parameter) -> tuple[Any, ...]:
    return () if parameter.default is parameter.empty else (parameter.default,)


def _as_call(signature: inspect.Signature, inputs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments as far as they go without a gap, the rest by keyword."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name not in inputs:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY or (
            parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and len(positional) == list(signature.parameters).index(name)
        ):
            positional.append(inputs[name])
        else:
            keywords[name] = inputs[name]
    return positional, keywords
