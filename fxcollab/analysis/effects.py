"""What a node does to its inputs: writes into their storage, or returns an alias of it.

A value that crosses into several branches must not be written in place by one of them. ``nn.ReLU(inplace=True)`` as
the first reader is the common case; it may hide inside a module that is kept whole, so such modules are traced here.
What can't be traced is taken to do everything.
"""

from __future__ import annotations

import inspect
import operator
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxcollab._torch import OpOverload, schema_of
from fxcollab.fx_utils import get_output
from fxcollab.rng import preserve_rng_state
from fxcollab.runtime.operators import INPLACE, CustomFunction
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.interface import InputSpec, Interface
from fxcollab.tracing.leaks import purge_leaked_proxies
from fxcollab.tracing.preserve import preserved
from fxcollab.tracing.tracer import COPIES, HELD_BY, LazyTracer
from fxcollab.tracing.twin import twin_of


@dataclass(frozen=True)
class Effects:
    """What may happen to the inputs of one node.

    Attributes:
        writes: inputs whose storage is written.
        shares: inputs whose storage the result may share.
        certain: False where the effects are assumed, because the node could not be analysed.
    """

    writes: frozenset[fx.Node] = frozenset()
    shares: frozenset[fx.Node] = frozenset()
    certain: bool = True


_STORE = {operator.setitem, setattr}
_SHARING_FUNCTIONS = {operator.getitem, getattr}
# Operators whose schema declares no alias although their result can be (a view of) their input.
_SHARING_NAMES = frozenset(
    (
        "alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "data", "dropout",
        "dropout1d", "dropout2d", "dropout3d", "einsum", "feature_alpha_dropout", "feature_dropout",
        "identity", "meshgrid", "pin_memory", "pixel_shuffle", "pixel_unshuffle", "requires_grad_", "rrelu",
        "type_as", "to_dense", "cpu", "cuda", "float", "double", "half", "bfloat16", "type", "contiguous",
    )
)  # fmt: skip
_FRESH_MODULES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.LogSoftmax, nn.Softplus, nn.PReLU,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class EffectAnalysis:
    """The effects of nodes of graphs over one root; each module is analysed once."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules: dict[tuple[nn.Module, frozenset[str]], _ModuleEffects | None] = {}

    def of(self, node: fx.Node) -> Effects:
        """What ``node`` does to its inputs."""
        if node.op == "call_module":
            return self._of_call(node, self._root.get_submodule(str(node.target)))
        if node.op == "call_method":
            return _of_operator(node, str(node.target), _nodes_in(node.args[:1]))
        if node.op == "call_function":
            return _of_function(node)
        return Effects()

    def _of_call(self, node: fx.Node, module: nn.Module) -> Effects:
        inputs = frozenset(node.all_input_nodes)
        arguments = _bind(module, node)
        found = None if arguments is None else self._of_module(module, frozenset(arguments))
        if arguments is None or found is None:
            return Effects(inputs, inputs, certain=False)
        return Effects(
            frozenset(_nodes_in(arguments.get(name) for name in found.writes)),
            frozenset(_nodes_in(arguments.get(name) for name in found.shares)),
        )

    def _of_module(self, module: nn.Module, given: frozenset[str]) -> _ModuleEffects | None:
        key = (module, given)
        if key not in self._modules:
            self._modules[key] = _module_effects(module, given)
        return self._modules[key]


@dataclass(frozen=True)
class _ModuleEffects:
    """Effects of a module by the names of its forward's parameters."""

    writes: frozenset[str]
    shares: frozenset[str]


def _module_effects(module: nn.Module, given: frozenset[str]) -> _ModuleEffects | None:
    """What ``module`` does to the ``given`` arguments; None where it can't be analysed."""
    if any(getattr(part, hook, None) for part in module.modules() for hook in _HOOKS):
        return None
    if any("forward" in part.__dict__ for part in module.modules()):  # replaced on the instance
        return None
    first = next(iter(inspect.signature(module.forward).parameters), "input")
    if getattr(module, "inplace", False) is True and type(module).__module__.startswith("torch.nn"):
        return _ModuleEffects(frozenset({first}), frozenset({first}))
    if isinstance(module, _FRESH_MODULES) and type(module).__module__.startswith("torch.nn"):
        return _ModuleEffects(frozenset(), frozenset())
    if type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Sequential):
        return _ModuleEffects(frozenset(), frozenset({first}))
    return _traced_effects(module, given)


def _traced_effects(module: nn.Module, given: frozenset[str]) -> _ModuleEffects | None:
    parameters = inspect.signature(module.forward).parameters
    interface = Interface(tuple(InputSpec(name, structured=True) for name in parameters if name in given))  # or not
    writes: set[str] = set()
    shares: set[str] = set()
    modules = list(module.modules())
    with purge_leaked_proxies() as proxies, preserve_rng_state(), preserved(modules):
        for training in (True, False):
            for part in modules:  # the flag alone: neither the children's nor through an overridden train()
                part.__dict__["training"] = training
            graph = _traced(module, interface, proxies)
            if graph is None:
                return None
            storages = track_storages(graph, EffectAnalysis(module), graph.find_nodes(op="placeholder"))
            if not all(write.certain for write in storages.writes):
                return None
            writes |= {str(node.target) for write in storages.writes for node in write.roots}
            returned = get_output(graph).all_input_nodes
            shares |= {str(root.target) for node in returned for root in storages.roots.get(node, ())}
    return _ModuleEffects(frozenset(writes), frozenset(shares))


def _traced(module: nn.Module, interface: Interface, proxies: list[weakref.ref[fx.Proxy]]) -> fx.Graph | None:
    """Its graph down to operations; None where it can't be traced."""
    twin = twin_of(module)
    for part in twin.model.modules():
        part.__dict__["training"] = module.training
    tracer = LazyTracer(twin, frozenset(), interface, operators=True, proxies=proxies, lines=False)
    try:
        return tracer.trace(twin.model)
    except (Exception, UntraceableError):  # whatever user code raises on proxies
        return None


@dataclass(frozen=True)
class Write:
    """One in-place write: the node that does it, and the tracked values whose storage it hits."""

    node: fx.Node
    roots: frozenset[fx.Node]
    certain: bool


@dataclass(frozen=True)
class Storages:
    """Which nodes share storage with the tracked values, and who writes into it.

    Attributes:
        roots: for every node that may share storage with tracked values, those values.
        writes: in-place writes into it, in the order of the graph.
    """

    roots: dict[fx.Node, frozenset[fx.Node]]
    writes: tuple[Write, ...]


def track_storages(
    graph: fx.Graph, effects: EffectAnalysis, tracked: Iterable[fx.Node], *, certain: bool = False
) -> Storages:
    """Follow the storage of ``tracked`` values through ``graph``; with ``certain`` only through certain effects."""
    roots = {node: frozenset({node}) for node in tracked}
    writes = []
    for node in graph.nodes:
        if not any(argument in roots for argument in node.all_input_nodes) or node.op == "output":
            continue
        effect = effects.of(node)
        if certain and not effect.certain:
            continue
        hit = _union(roots, effect.writes) & _possibly_written(node, roots)
        if hit:
            writes.append(Write(node, hit, effect.certain))
        shared = _union(roots, effect.shares)
        if shared:
            roots[node] = roots.get(node, frozenset()) | shared
    return Storages(roots, tuple(writes))


def with_aliases(graph: fx.Graph, effects: EffectAnalysis, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes``, and the earlier values of which they are aliases."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        if node in found:
            effect = effects.of(node)
            found |= effect.shares if effect.certain else frozenset()
    return found


def _possibly_written(node: fx.Node, roots: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """The tracked values into which ``node`` can write; for a list or dict, those that it was seen to contain."""
    names = node.meta.get(HELD_BY)
    return frozenset(node for node in roots if names is None or node.name in names)


def _union(roots: dict[fx.Node, frozenset[fx.Node]], nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
    return frozenset().union(*(roots.get(node, frozenset()) for node in nodes))


def _of_function(node: fx.Node) -> Effects:
    function, first = node.target, frozenset(_nodes_in(node.args[:1]))
    if function in _STORE:
        return Effects(first)
    if function in INPLACE.values():
        return Effects(first, first)
    if _makes_a_container(function):
        return Effects(shares=frozenset(node.all_input_nodes))
    if function in _SHARING_FUNCTIONS:
        return Effects(shares=frozenset() if COPIES in node.meta else first)
    if isinstance(function, OpOverload):
        return _of_schemas(node, [schema_of(function)])
    name = getattr(function, "__name__", "")
    if getattr(function, "__module__", "") in ("_operator", "operator"):
        inplace = name.startswith("i") and hasattr(operator, name[1:])
        return Effects(first, first) if inplace else Effects()
    if not _is_of_torch(function):
        inputs = frozenset(node.all_input_nodes)
        return Effects(inputs, inputs, certain=False)
    return _of_operator(node, name, first)


def _makes_a_container(function: Any) -> bool:
    """Whether ``function`` is a named tuple or a dataclass, into which the tracer puts what a forward returns."""
    return isinstance(function, type) and (issubclass(function, tuple) or is_dataclass(function))


def _is_of_torch(function: Any) -> bool:
    if isinstance(function, CustomFunction):
        return False
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] in ("", "torch", "builtins", "math", "fxcollab")


def _of_operator(node: fx.Node, name: str, first: Iterable[fx.Node]) -> Effects:
    """A torch function or tensor method, judged by its name and by the schemas of the operator behind it."""
    first, inputs = frozenset(first), frozenset(node.all_input_nodes)
    if "out" in node.kwargs:
        out = frozenset(_nodes_in([node.kwargs["out"]]))
        return Effects(out, out)
    if node.kwargs.get("inplace") is True or _inplace_by_position(node):
        return Effects(first, first)
    if name in _SHARING_NAMES:
        return Effects(shares=inputs)
    schemas = _schemas(name)
    if schemas:
        return _of_schemas(node, schemas)
    if name.endswith("_") and not name.endswith("__"):
        return Effects(first, first)
    return Effects(shares=inputs)


def _inplace_by_position(node: fx.Node) -> bool:
    """``F.relu(x, True)``: an ``inplace`` parameter given by position."""
    if node.op != "call_function" or not callable(node.target):
        return False
    try:
        parameters = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):
        return False
    if "inplace" not in parameters:
        return False
    position = parameters.index("inplace")
    return len(node.args) > position and node.args[position] is not False


@cache
def _schemas(name: str) -> list[Any]:
    """The schemas of the operator of that name; empty where torch has none."""
    for namespace, candidate in (("aten", name), ("aten", f"special_{name}")):
        packet = getattr(getattr(torch.ops, namespace), candidate, None)
        if packet is not None:
            return [schema_of(getattr(packet, overload)) for overload in packet.overloads()]
    return []


def _of_schemas(node: fx.Node, schemas: list[Any]) -> Effects:
    """Writes and aliases that any overload declares; a method's self is its first argument."""
    writes: set[fx.Node] = set()
    shares: set[fx.Node] = set()
    for schema in schemas:
        returned = {alias for value in schema.returns if value.alias_info for alias in value.alias_info.before_set}
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None or argument.is_out:
                continue
            value = node.kwargs.get(argument.name)
            value = node.args[position] if value is None and position < len(node.args) else value
            touched = set(_nodes_in([value]))
            if argument.alias_info.is_write:
                writes |= touched
            if argument.alias_info.before_set & returned or "*" in argument.alias_info.after_set:
                shares |= touched
    return Effects(frozenset(writes), frozenset(shares))


def _bind(module: nn.Module, node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a call by the names of the forward's parameters; None where the signature is unknown."""
    try:
        return dict(inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments)
    except (TypeError, ValueError):  # the latter of a forward in C, such as torch.jit's
        return None


def _nodes_in(values: Iterable[Any]) -> list[fx.Node]:
    """The nodes in nested arguments."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    map_arg(tuple(values), note)
    return found
