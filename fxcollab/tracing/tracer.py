"""The tracer: opens the modules it is told to and keeps every other one whole."""

from __future__ import annotations

import inspect
import operator
import threading
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict

from fxcollab._torch import is_compiled, pytree
from fxcollab.runtime.operators import RETURN_THEIR_INPUT, guard, stop_gradient, writes_in_place
from fxcollab.tracing.answers import Answers
from fxcollab.tracing.callers import calling_lines, scopes
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.example_values import Examples, ExampleValues
from fxcollab.tracing.helpers import Helper, kept_whole
from fxcollab.tracing.interface import Interface, as_call
from fxcollab.tracing.patches import RecordFactories, patched, rewired
from fxcollab.tracing.proxy import CaptureProxy, unformat

RETURNED_BY = "fxcollab_returned_by"
"""Meta key: the calls (``path`` or ``path@k``) of opened modules that return this node's value."""

HELD_BY = "fxcollab_held_by"
"""Meta key of an assignment to an item of a list or dict: the nodes in whose values it is found."""

COPIES = "fxcollab_copies"
"""Meta key of an item that is no view: ``x[mask]``."""

# Tracing patches torch while it lasts.
_ONE_AT_A_TIME = threading.RLock()
_SET_ON_THE_ROOT = (torch.Generator, torch.ScriptObject)  # what torch.fx would give a name on the caller's model


def call_name(path: str, number: int) -> str:
    """What a module's call is called: ``path``, and from the second on ``path@2``."""
    return path if number == 1 else f"{path}@{number}"


class LazyTracer(fx.Tracer):
    """A symbolic tracer that never writes to the model it traces.

    Unlike ``fx.Tracer`` it records tensor factories (``torch.rand``, ``arange``) as nodes instead of freezing
    what they return, reads buffers as nodes so that counting in place happens at every call, keeps in-place
    operators in place, custom ``autograd.Function``s whole and ``no_grad`` regions without gradient, keeps
    constants to itself instead of setting them on the model, and looks state up in constant time.

    Args:
        opened: paths of the modules to trace into.
        interface: which arguments become placeholders.
        operators: also trace into whatever plain fx would, down to operations and torch's own layers.
        constants: those of the other mode's graph; equal ones keep their names.
        helpers: functions that become one node each.
        examples: an example of each input, for questions that the graph can't answer; None refuses them. Lines
            whose questions were answered so are among the ``notes``.
        proxies: gets a reference of every proxy.
        lines: note on every node the lines of code that led to it.

    After a trace, ``opened`` holds the modules that were traced into, by path, and ``constants`` the tensors that are
    none of the model's state.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        opened: frozenset[str],
        interface: Interface,
        *,
        operators: bool = False,
        constants: Mapping[str, Tensor] | None = None,
        helpers: Iterable[Helper] = (),
        examples: Examples | None = None,
        proxies: list[weakref.ref[fx.Proxy]] | None = None,
        lines: bool = True,
    ) -> None:
        super().__init__()
        self._opened_paths, self._interface, self._operators = opened, interface, operators
        self._helpers, self._examples, self._lines = tuple(helpers), examples, lines
        self._given = dict(constants or {})
        self._proxies = proxies if proxies is not None else []
        self.constants: dict[str, Tensor] = {}
        self.tensors: Mapping[str, Tensor] = {}
        self.notes: dict[str, None] = {}
        self.opened: dict[str, nn.Module] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace ``root``; see ``fx.Tracer.trace``."""
        self.constants, self.opened = dict(self._given), {"": root}
        named = dict(_state_by_name(root))
        self._state = {id(tensor): name for name, tensor in named.items()}
        self.tensors = ChainMap(self.constants, named)
        self._constant_names: dict[int, str] = {}
        self._gradient_free: dict[fx.Node, fx.Proxy] = {}
        self._state_proxies: dict[str, fx.Proxy] = {}
        with _ONE_AT_A_TIME:
            self._thread = threading.get_ident()
            try:
                return self._trace(root, concrete_args)
            finally:
                self._gradient_free.clear()
                self._state_proxies.clear()

    def _trace(self, root: Any, concrete_args: dict[str, Any] | None) -> fx.Graph:
        example_values = ExampleValues(root, self._examples, self.tensors) if self._examples is not None else None
        self.answers = Answers(self._interface, example_values, self.tensors, self._record, self.notes)
        with (
            torch.enable_grad(),
            patched(self),
            rewired(self, scopes(root)),
            RecordFactories(self),
            kept_whole(self._helpers, self._record_helper),
        ):
            return super().trace(root, concrete_args)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Whether a proxy is true."""
        return bool(self.answers.ask(obj, "bool"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a proxy's value."""
        return self.answers.iterate(obj)

    def keys(self, obj: fx.Proxy) -> Any:
        """The keys of a proxy's value."""
        keys = self.answers.keys(obj)
        return super().keys(obj) if keys is None else keys

    def set_item(self, target: fx.Proxy, key: Any, value: Any) -> None:
        """Record ``target[key] = value``; of a list or dict, where else it is held."""
        holders = self.answers.holders(target)
        node = self._record(operator.setitem, (target, key, value)).node
        if holders is not None:
            node.meta[HELD_BY] = holders

    def _record(self, function: Any, args: tuple[Any, ...]) -> Any:
        return self.create_proxy("call_function", function, args, {})

    def _record_helper(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.answers.evaluating:
            return function(*args, **kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy of a new node."""
        proxy = CaptureProxy(node, self)
        self.remember(proxy)
        return proxy

    def remember(self, proxy: fx.Proxy) -> None:
        """Note a proxy, to be taken out of caches afterwards."""
        self._proxies.append(weakref.ref(proxy))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an operation, and the lines of the author's code that led to it."""
        node = super().create_node(*args, **kwargs)
        if self._lines:
            node.stack_trace = calling_lines(LazyTracer.trace.__code__)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Record an operation; inside ``torch.no_grad()``, one without gradient.

        What is None for the example is None: ``if mask is None`` can't be asked of a proxy.
        """
        value = self._create_proxy(kind, target, args, kwargs, *rest, **more)
        if target is operator.getitem and self.answers.copies(args[1]):
            value.node.meta[COPIES] = True
        return None if self.answers.is_none(value) else value

    def _create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if kind not in ("call_function", "call_method", "call_module") or target is stop_gradient:
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if torch.is_grad_enabled():
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if kind == "call_module" or name in RETURN_THEIR_INPUT:
            value = super().create_proxy(kind, target, args, kwargs, *rest, **more)
            given = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy))
            return self.create_proxy("call_function", stop_gradient, (value, given), {})
        written = args[0] if writes_in_place(target, kwargs) else None
        args, kwargs = pytree.tree_map(
            lambda leaf: self._stopped(leaf) if isinstance(leaf, fx.Proxy) else leaf, (args, kwargs)
        )
        value = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        self._gradient_free[value.node] = value
        return value if written is None else written

    def _stopped(self, value: fx.Proxy) -> fx.Proxy:
        """``value`` without its gradient: one node for each value."""
        if value.node not in self._gradient_free:
            stopped = self.create_proxy("call_function", stop_gradient, (value,), {})
            self._gradient_free[value.node] = self._gradient_free[stopped.node] = stopped
        return self._gradient_free[value.node]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep ``m`` whole unless it is to be opened."""
        if module_qualified_name in self._opened_paths:
            return False
        if not self._operators or _compiler_of(m) is not None:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call, and for an opened module which value it returned."""
        path = self._path_of(m) if self._is_recording else None
        if path is None:
            return forward(*args, **kwargs)
        if not self.is_leaf_module(m, path):
            self._open(m, path)
        elif _compiler_of(m) is None and any(
            "__call__" in vars(cls) for cls in type(m).__mro__[: type(m).__mro__.index(nn.Module)]
        ):
            raise UntraceableError(f"{path} has a __call__ of its own, which would run twice")
        calls = self.num_calls.get(path, 0) + 1
        value = super().call_module(m, forward, args, kwargs)
        if isinstance(value, fx.Proxy):
            value.node.meta.setdefault(RETURNED_BY, []).append(call_name(path, calls))
        return value

    @property
    def _is_recording(self) -> bool:
        """Whether what runs is the traced forward: not one of another thread, nor an example's."""
        return not self.answers.evaluating and threading.get_ident() == self._thread

    def _open(self, module: nn.Module, path: str) -> None:
        compiler = _compiler_of(module)
        if compiler is not None:
            raise UntraceableError(f"{path} is compiled by {compiler}, and can only be kept whole")
        self.opened[path] = module

    def _path_of(self, module: nn.Module) -> str | None:
        """The path of a module; None for one without state that the forward has just made."""
        try:
            return str(self.path_of_module(module))
        except NameError:
            made = next((name for name, _ in [*module.named_parameters(), *module.named_buffers()]), None)
            if made is None:
                return None
            raise UntraceableError(
                f"a {type(module).__qualname__} with state ({made}) is no submodule: the forward makes or hides it"
            ) from None

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Parameters and buffers become nodes, one for each tensor."""
        name = self._state.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        return self._state_proxy(name) if name is not None and self._is_recording else attr_val

    def proxy_of_state(self, tensor: Any) -> fx.Proxy | None:
        """The proxy of a parameter, a buffer or a plain attribute; None for any other value."""
        name = self._state.get(id(tensor))
        return None if name is None else self._state_proxy(name)

    def _state_proxy(self, name: str) -> fx.Proxy:
        if name not in self._state_proxies:
            self._state_proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._state_proxies[name]

    def create_arg(self, a: Any) -> Any:
        """Tensors become nodes: state under its own name, constants under names kept by the tracer.

        So do texts with proxies in them, such as the messages of assertions.
        """
        if isinstance(a, str):
            return self._text(a)
        if type(a).__module__ == "numpy" and hasattr(a, "item") and not getattr(a, "ndim", 1):
            return a.item()  # a number of numpy's is written as one of Python's
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):  # fx would take it for a plain one
            entries = {k: self.create_arg(v) for k, v in a.items()}
            if hasattr(type(a), "__dataclass_fields__"):
                return self.create_node("call_function", type(a), (), entries)
            return self.create_node("call_function", type(a), (entries,), {})
        if not isinstance(a, Tensor):
            try:
                if not isinstance(a, _SET_ON_THE_ROOT):
                    return super().create_arg(a)
            except NotImplementedError:
                pass
            raise UntraceableError(f"an object of type {type(a).__qualname__} is handed on, which a graph can't hold")
        name = self._state.get(id(a)) or self._constant_names.get(id(a))
        if name is None:
            name = self._constant_names[id(a)] = self._name_constant(a)
            self.constants[name] = a
        return self.create_node("get_attr", name, (), {})

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the inputs; what is fixed has its value, and all else its default."""
        signature = inspect.signature(self.root.forward)
        annotations = getattr(inspect.unwrap(root_fn), "__annotations__", {})
        inputs = {
            spec.name: self.create_proxy(
                "placeholder",
                spec.name,
                _default(signature.parameters[spec.name]),
                {},
                type_expr=annotations.get(spec.name),
            )
            for spec in self._interface.inputs
        }

        for name, proxy in inputs.items():
            if signature.parameters[name].default is None:  # the forward went the way of a value
                self._record(guard, ("is None", proxy, False, f"{type(self.root).__qualname__}.forward"))

        def forward() -> Any:
            positional, keywords = as_call(signature, {**inputs, **dict(self._interface.fixed)})
            return self.root.forward(*positional, **keywords)  # its own, where one was set on the object

        forward.__annotations__ = {k: v for k, v in annotations.items() if k == "return"}
        return forward, []

    def _text(self, text: str) -> Any:
        template, names = unformat(text)
        if not names:
            return text
        nodes = {node.name: node for node in self.graph.nodes}
        return self.create_node("call_method", "format", (template, *(nodes[name] for name in names)), {})

    def _name_constant(self, constant: Tensor) -> str:
        used = set(self._constant_names.values())
        for name, known in self.constants.items():
            if name not in used and known.dtype == constant.dtype and torch.equal(known, constant):
                return name
        count = len(self.constants)
        while hasattr(self.root, f"_tensor_constant{count}"):
            count += 1
        return f"_tensor_constant{count}"


def _compiler_of(module: nn.Module) -> str | None:
    """What has compiled a module; its forward is no longer there to be traced."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    return "torch.compile" if is_compiled(module) else None


def _state_by_name(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor reachable as an attribute; registered state last, so that its names win."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        yield from ((prefix + k, v) for k, v in module.__dict__.items() if isinstance(v, Tensor))
    yield from reversed(list(root.named_buffers()))
    yield from reversed(list(root.named_parameters()))


def _default(parameter: inspect.Parameter) -> tuple[Any, ...]:
    return () if parameter.default is parameter.empty else (parameter.default,)
