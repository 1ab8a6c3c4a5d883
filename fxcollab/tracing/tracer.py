"""The tracer: traces into given modules; every other module is a leaf."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict

from fxcollab._torch import is_compiled, pytree
from fxcollab.deep_copy import parts_of_value
from fxcollab.functional import named_tensors
from fxcollab.rng import ONE_AT_A_TIME, ForeignState
from fxcollab.runtime.operators import (
    GRADIENT_METHODS,
    GradientMethod,
    guard,
    set_data_,
)
from fxcollab.tracing.assigned_buffers import AssignedBuffers
from fxcollab.tracing.attribute_reads import noted_reads, values_of
from fxcollab.tracing.callers import calling_line, calling_lines, user_scopes
from fxcollab.tracing.errors import ArgumentError, DrawnError, FirstCallError, UntraceableError
from fxcollab.tracing.example_values import Examples, ExampleValues
from fxcollab.tracing.helpers import Helper, asking_helper, cached_helper, is_helper, record_helpers
from fxcollab.tracing.interface import Interface, as_call, or_default
from fxcollab.tracing.leaks import watch
from fxcollab.tracing.names import Names
from fxcollab.tracing.no_grad import NoGradRegion
from fxcollab.tracing.patches import overrides_call, patched_torch, recorded_overrides
from fxcollab.tracing.proxy import CaptureProxy, unformat
from fxcollab.tracing.queries import Indices, ProxyQueries, comes_from_helper
from fxcollab.tracing.tensor_functions import TensorFunctions
from fxcollab.tracing.twin import Attributes, Twin
from fxcollab.tracing.user_globals import patched_globals

RETURNED_BY = "fxcollab_returned_by"
"""Meta key: the calls (``path`` or ``path@k``) of opened modules that return this node's value."""

SHARES_LISTS = "fxcollab_shares_lists"
"""Meta key: whether the call is handed a list or dict that other calls are handed, too."""


def call_name(path: str, number: int) -> str:
    """The name of a module's call: ``path``, and ``path@2`` for the second one."""
    return path if number == 1 else f"{path}@{number}"


class LazyTracer(fx.Tracer):
    """A symbolic tracer of a twin, whose graphs refer to the state of the model itself.

    Unlike ``fx.Tracer`` it records tensor factories (``torch.rand``, ``arange``) as nodes instead of freezing
    what they return, reads buffers as nodes so that counting in place happens at every call, keeps in-place
    operators in place, custom ``autograd.Function``s whole and ``no_grad`` regions without gradient, keeps
    constants to itself instead of setting them on the model, and looks state up in constant time.

    It traces into the modules of which ``opened`` has the paths, with ``operators`` also into every other that
    ``fx.Tracer`` traces into. A constant that equals one of ``constants``, those of the other mode's graph, gets its
    name. Without ``examples``, a forward that needs concrete values can't be traced. A node's stack trace has the
    lines of user code that led to it.

    After a trace, ``asking`` has helpers that asked for what a proxy doesn't have: as nodes they need no answers,
    which differ for other inputs; its values tell whether yes and no were all answers. ``asked`` has helpers whose
    results were asked whether they are true. ``opened`` has the modules that were traced into, by path,
    ``constants`` the tensors that are not state of the model, ``attributes`` those of which the graph has the
    values, and ``notes`` sentences about what isn't preserved.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        twin: Twin,
        opened: frozenset[str],
        interface: Interface,
        *,
        operators: bool,
        constants: Mapping[str, Tensor],
        helpers: Iterable[Helper],
        never_nodes: Iterable[Helper],
        examples: Examples | None,
        indices: Indices,
        before_each_node: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._before_each_node = before_each_node
        self._twin = twin
        self._opened_paths, self._interface, self._operators = opened, interface, operators
        self._helpers, self._never_nodes = tuple(helpers), tuple(never_nodes)
        self._examples, self._known, self._indices = examples, constants, indices
        self.notes: dict[str, None] = {}
        self.asking, self.asked = dict[Helper, bool](), list[Helper]()
        self.opened: dict[str, nn.Module] = {}
        self._thread: int | None = None  # none, as long as other threads may ask before the trace

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace ``root``; see ``fx.Tracer.trace``."""
        self.opened = {"": self._twin.original}
        modules = list(self._twin.original.named_modules())
        self._paths: dict[int, str] = {id(module): path for path, module in reversed(modules)}
        real = self._examples is not None and self._examples.real
        self.names = Names(self._twin, self._known, real=real)
        self._buffers = AssignedBuffers(self._twin)
        self._handed: dict[int, tuple[Any, list[fx.Node]]] = {}  # lists and dicts, with the calls that have them
        self._from_state: list[fx.Node] = []
        self._no_grad = NoGradRegion(self._record)
        self._state_proxies: dict[str, fx.Proxy] = {}
        before = Attributes(root, dict(root.named_modules()) if self._operators else self._opened_paths)
        with ONE_AT_A_TIME:  # since tracing patches torch
            values = None if self._examples is None else self.values_for(self._examples)
            if values is not None:
                self.names.note_example(values.given())
            self.queries = ProxyQueries(
                self._interface, values, self.names.tensors, self._record, self.notes, self._indices
            )
            self._thread, self._generators = threading.get_ident(), ForeignState()
            with (
                torch.enable_grad(),
                patched_torch(self),
                recorded_overrides(self, root),
                patched_globals(self, user_scopes(root)),
                TensorFunctions(self),
                record_helpers(self._helpers, self._record_helper),
                noted_reads(root, lambda: self._is_recording) as reads,
            ):
                graph = super().trace(root, concrete_args)
        self._buffers.keep_values_before()
        self.constants = self.names.constants
        self._erase_unused()
        assigned = before.changed()
        self.notes |= dict.fromkeys(self._limitations(graph, assigned))
        kept = [read for read in reads if ".".join(read).lstrip(".") not in assigned]
        self.attributes = values_of(root, kept)
        _refuse_parameters_made_at_the_first_call(root)
        return graph

    def values_for(self, examples: Examples) -> ExampleValues:
        """Example values of the graph's nodes."""
        return ExampleValues(self._twin.original, self._twin.training, examples, self.names.tensors)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Whether a proxy is true."""
        return bool(self.queries.evaluate(obj, "bool"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The members of a proxy's value."""
        return self.queries.iterate(obj)

    def keys(self, obj: fx.Proxy) -> Any:
        """The keys of a proxy's value."""
        keys = self.queries.keys(obj)
        return super().keys(obj) if keys is None else keys

    def _record(self, function: Any, args: tuple[Any, ...]) -> Any:
        if function is guard:
            helper = asking_helper((*self._helpers, *self._never_nodes), LazyTracer.trace.__code__)
            if helper is None and args[0] == "value":
                helper = cached_helper(self._helpers)
            if helper is not None:
                self.asking[helper] = self.asking.get(helper, True) and isinstance(args[2], bool)
            elif args[0] == "bool" and args[1].node.op == "call_function":
                self.asked.append(args[1].node.target)
        return self.create_proxy("call_function", function, args, {})

    def _record_helper(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self._is_recording:
            return function(*args, **kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy of a node."""
        proxy = CaptureProxy(node, self)
        watch(proxy)
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an operation, and the lines of user code that led to it."""
        self._before_each_node()
        if self._generators.foreign_numbers_were_drawn():
            raise DrawnError("random numbers of Python or numpy are drawn, by the forward or by another thread")
        node = super().create_node(*args, **kwargs)
        node.stack_trace = calling_lines(LazyTracer.trace.__code__)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Record an operation; inside ``torch.no_grad()``, one without gradient.

        Returns None if the example value is None: ``if mask is None`` is always false for a proxy.
        """
        if kind == "call_method" and target in GRADIENT_METHODS:
            arguments = self._twin.of_original((*args[1:], *kwargs.values()))
            if any(isinstance(part, fx.Proxy) for part in parts_of_value(arguments)):
                raise UntraceableError(f"what {target} is given holds values that the forward computes")
            kind, target = "call_function", GradientMethod(target, arguments)
            args, kwargs = args[:1], {}
        value = self._create_proxy(kind, target, args, kwargs, *rest, **more)
        none = self.queries.is_none(value)
        if self._examples is not None and comes_from_helper(value.node):  # which may return None for other inputs
            self._record(guard, ("is None", value, none, "{}:{}".format(*calling_line()[1:])))
        return None if none else value

    def _create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if not self._no_grad.holds(kind, target):
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind != "call_module":
            args, kwargs = self._with_proxies((args, kwargs))

        def create(args: Any, kwargs: Any) -> Any:
            return super(LazyTracer, self).create_proxy(kind, target, args, kwargs, *rest, **more)

        return self._no_grad.recorded(create, kind, target, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` becomes one node."""
        if module_qualified_name in self._opened_paths:
            return False
        if not self._operators or self._compiler_of(module_qualified_name) is not None:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call, and for an opened module which value it returned."""
        path = self._path_of(m) if self._is_recording else None
        if path is None:
            return forward(*args, **kwargs)
        compiler = self._compiler_of(path)
        if not self.is_leaf_module(m, path):
            if compiler is not None:
                raise UntraceableError(f"{path} is compiled by {compiler}, and can only be a leaf module")
            self.opened[path] = self._twin.original.get_submodule(path)
        if compiler is None and not m._forward_pre_hooks and not overrides_call(m):  # which may change the arguments
            _check_arguments(m.forward, args, kwargs)
        calls = self.num_calls.get(path, 0) + 1
        value = super().call_module(m, forward, args, kwargs)
        if isinstance(value, fx.Proxy):
            value.node.meta.setdefault(RETURNED_BY, []).append(call_name(path, calls))
            self._note_lists(value.node, (*args, *kwargs.values()))
        return value

    def _note_lists(self, call: fx.Node, given: Any) -> None:
        """Mark calls that are handed the same list or dict as others."""
        if isinstance(given, list | dict):
            _, calls = self._handed.setdefault(id(given), (given, []))
            calls.append(call)
            for each in calls if len(calls) > 1 else ():
                each.meta[SHARES_LISTS] = True
        if isinstance(given, list | dict | tuple):
            for part in given.values() if isinstance(given, dict) else given:
                self._note_lists(call, part)

    def call_whole(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a leaf module; of any other run it."""
        path = self._path_of(module) if self._is_recording else None
        if path is None or not self.is_leaf_module(module, path):
            return call(*args, **kwargs)
        return self.call_module(module, call, args, kwargs)

    @property
    def _is_recording(self) -> bool:
        """Whether the traced forward is running, not one of another thread or for example values."""
        return threading.get_ident() == self._thread and not self.queries.computing

    def _path_of(self, module: nn.Module) -> str | None:
        """The path of a module; None for one without state of its own that the forward has just created."""
        path = self._paths.get(id(module))  # reached through a global or a weak reference
        if path is not None:
            return path
        try:
            return str(self.path_of_module(module))
        except NameError:
            # A slice of a Sequential only has what the model has, too.
            state = next(
                (name for name, tensor in named_tensors(module) if self.names.of_state(tensor) is None), None
            )
            if state is None:
                return None
            name = type(module).__qualname__
            raise UntraceableError(
                f"a {name} with state ({state}) is not a submodule: the forward creates or hides it"
            ) from None

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Parameters and buffers become nodes, one for each tensor."""
        proxy = self.proxy_of_state(attr_val) if isinstance(attr_val, Tensor) and self._is_recording else None
        return attr_val if proxy is None else proxy

    def proxy_of_state(self, tensor: Any) -> fx.Proxy | None:
        """The proxy of a parameter, a buffer, or a tensor in an attribute; None for any other value."""
        name = self.names.of_state(tensor)
        return None if name is None else self._proxy_of(name)

    def _proxy_of(self, name: str) -> fx.Proxy:
        if name not in self._state_proxies:
            self._state_proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._state_proxies[name]

    def record_of_state(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Record what is computed from the model's tensors; erased afterwards if nothing uses it."""
        before = next(iter(reversed(self.graph.nodes)), None)

        args, kwargs = self._with_proxies((args, kwargs))
        value = function(*args, **kwargs)
        nodes = itertools.takewhile(lambda node: node is not before, reversed(self.graph.nodes))
        self._from_state += reversed(list(nodes))
        return value

    def _with_proxies(self, values: Any) -> Any:
        """Nested values with proxies for the model's tensors."""

        def proxy(leaf: Any) -> Any:
            return self._proxy_of(self.names.of_tensor(leaf)) if self.names.is_state(leaf) else leaf

        return pytree.tree_map_only(Tensor, proxy, values)

    def assign_buffer(self, module: nn.Module, name: str, value: fx.Proxy) -> None:
        """Record an assignment to a buffer: it is written into the tensor that is there."""
        place = self._buffers.place_of(module, name) if self._is_recording else None
        if place is not None:
            self._buffers.note(place, self._record(set_data_, (self._proxy_of(place), value)).node)

    def _limitations(self, graph: fx.Graph, assigned: Iterable[str]) -> Iterator[str]:
        for path in self._twin.shared:
            yield f"{path} can't be copied, so that the forward was traced with the model's own"
        for name in assigned:
            yield f"what the forward assigns to {name} is not kept: the graph reads the value it had"
        for name in self.names.of_changed_objects():
            yield f"what the forward assigns to attributes of {name} is not kept: the graph reads old values"
        for helper in self._helpers:
            if is_helper(helper) and graph.find_nodes(op="call_function", target=helper):
                yield f"function {helper.__module__}.{helper.__qualname__} can't be traced: calls of it are one node"

    def _erase_unused(self) -> None:
        """Erase what was recorded from state in passing, as by ``state_dict()``."""
        for node in reversed(self._from_state):
            if not node.users:
                self.graph.erase_node(node)

    def create_arg(self, a: Any) -> Any:
        """Tensors become nodes: state by its name, constants by names that the tracer gives them.

        So do texts with proxies in them, such as the messages of assertions.
        """
        if isinstance(a, str):
            return self._text(a)
        if type(a).__module__ == "numpy" and hasattr(a, "item") and not getattr(a, "ndim", 1):
            return a.item()  # a number
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):  # fx would make a plain one of it
            entries = {k: self.create_arg(v) for k, v in a.items()}
            if hasattr(type(a), "__dataclass_fields__"):
                return self.create_node("call_function", type(a), (), entries)
            return self.create_node("call_function", type(a), (entries,), {})
        if isinstance(a, Tensor):
            return self.create_node("get_attr", self.names.of_tensor(a), (), {})
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self.create_node("call_function", type(a), tuple(map(self.create_arg, a)), {})
        if isinstance(a, torch.Generator):  # of which every branch would draw the next numbers
            raise ArgumentError(a)
        if is_dataclass(a) and (name := self._name_of_object(a)) is not None:
            return self.create_node("get_attr", name, (), {})
        try:
            return super(fx.Tracer, self).create_arg(a)  # ``fx.Tracer`` itself would set objects on the model
        except NotImplementedError:
            name = self._name_of_object(a)
        if name is None:
            raise ArgumentError(a)
        return self.create_node("get_attr", name, (), {})

    def _name_of_object(self, value: Any) -> str | None:
        """The name of a module, or of an attribute of a module or its class, such as a configuration."""
        path = self._path_of(value) if isinstance(value, nn.Module) else None
        return self.names.of_object(value) if path is None else path

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Create placeholders for the inputs; other parameters have their fixed values or defaults."""
        signature = inspect.signature(self.root.forward)
        annotations = getattr(inspect.unwrap(root_fn), "__annotations__", {})
        inputs: dict[str, fx.Proxy] = {}
        defaults = self._interface.default_values(signature)
        tensors = {name for name, value in defaults.items() if any(map(torch.is_tensor, pytree.tree_leaves(value)))}
        for spec in self._interface.inputs:
            name, annotation = spec.name, annotations.get(spec.name)
            args = () if name not in defaults else (None,) if name in tensors else (defaults[name],)
            inputs[name] = self.create_proxy("placeholder", name, args, {}, type_expr=annotation)
        for name, proxy in inputs.items():
            if name in tensors:
                inputs[name] = self._record(or_default, (proxy, defaults[name]))
            elif name in signature.parameters and signature.parameters[name].default is None:
                # ``if mask is None`` is false for a proxy
                place = f"{type(self.root).__qualname__}.forward, argument {name}"
                self._record(guard, ("is None", proxy, False, place))

        call = partial(self._call_root, *as_call(signature, {**inputs, **dict(self._interface.fixed)}))
        vars(call)["__annotations__"] = {k: v for k, v in annotations.items() if k == "return"}
        return call, []

    def _call_root(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self.root.forward(*args, **kwargs)  # which may be set on the object, not its class

    def _text(self, text: str) -> Any:
        template, names = unformat(text)
        if not names:
            return text
        nodes = {node.name: node for node in self.graph.nodes}
        return self.create_node("call_method", "format", (template, *(nodes[name] for name in names)), {})

    def _compiler_of(self, path: str) -> str | None:
        """What has compiled a module, so that its forward can't be traced; None for any other module."""
        module = self._twin.original.get_submodule(path)
        if isinstance(module, torch.jit.ScriptModule):
            return "TorchScript"
        return "torch.compile" if is_compiled(module) else None


def _refuse_parameters_made_at_the_first_call(root: nn.Module) -> None:
    for path, module in root.named_modules():
        # Parameter() marks what it returns, here a proxy
        made = [k for k, v in vars(module).items() if isinstance(v, fx.Proxy) and "_is_param" in vars(v)]
        if made:
            raise FirstCallError(
                "The forward makes parameters at its first call, and keeps them.",
                where=f"{path}.{made[0]}".removeprefix("."),
                why="the graph would draw them again at every call, and they would not be trained",
                hint="call the model once on an example, then transform it",
            )


def _check_arguments(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise the TypeError of a call that doesn't fit the signature: the code around it may catch it."""
    try:
        signature = inspect.signature(forward, follow_wrapped=False)
    except (TypeError, ValueError):  # written in C
        return
    signature.bind(*args, **kwargs)
