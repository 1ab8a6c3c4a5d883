"""Profile one training step of a captured model on fake tensors: what each node costs.

Every instance of a node costs what the node costs, so the profile of the original is enough to compute the costs of
any head tree over it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import (
    DATA_DEPENDENT_ERRORS,
    DEVICE_OF,
    OpOverload,
    TorchDispatchMode,
    pytree,
)
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.contents import tensors_in
from fxcollab.errors import CaptureError, FxCollabError, one_line
from fxcollab.flops import flops_of
from fxcollab.fx_utils import Interpreter
from fxcollab.tracing.examples import real_values, run_on_twin, why_not
from fxcollab.tracing.interface import ExampleInputs, Interface
from fxcollab.tracing.leaks import purge_leaks

Moment: TypeAlias = tuple[Literal["forward", "backward"], fx.Node]


@dataclass(frozen=True, eq=False)
class Allocation:
    """Storage that outlives the moment in which it is allocated.

    Attributes:
        bytes: its size.
        born: the phase and the node that allocated it.
        died: the phase and the node in which it is freed; None where it outlives the step, as gradients do.
        values: the nodes whose values lie in it.
    """

    bytes: int
    born: Moment
    died: Moment | None
    values: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class NodeCost:
    """What one instance of a node costs in a training step.

    Attributes:
        forward_flops, backward_flops: floating point operations, as computed by ``FlopCounterMode``.
        forward_bytes, backward_bytes: by how much memory grows at most while the node runs.
        shape: of the value, if it is a single tensor.
        dtype: of that tensor, such as ``"float32"``.
        differentiable: whether the value requires a gradient.
        floating: whether the value has a floating-point or complex tensor.
    """

    forward_flops: int = 0
    backward_flops: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    differentiable: bool = False
    floating: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the value, if it is a single tensor."""
        kind = getattr(torch, self.dtype) if self.dtype else None
        return math.prod(self.shape or ()) * kind.itemsize if kind and self.shape is not None else 0

    @property
    def flops(self) -> int:
        """Of a whole step."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True, eq=False)
class Profile:
    """What a training step of a captured model costs, node by node.

    Attributes:
        nodes: the cost of every node of the train mode's graph.
        allocations: storage that is kept from one node to another, in the order of allocation.
        backward: the nodes in the order in which their backward runs.
        inputs: the bytes of the inputs.
        on_examples: whether it ran on the example inputs themselves, because the work depends on their values.
    """

    nodes: Mapping[fx.Node, NodeCost]
    allocations: tuple[Allocation, ...]
    backward: tuple[fx.Node, ...]
    inputs: int
    on_examples: bool = False

    def kept_bytes(self) -> Mapping[fx.Node, int]:
        """Bytes that each node keeps for the backward."""
        kept: dict[fx.Node, int] = {}
        for allocation in self.allocations:
            phase, node = allocation.born
            if phase == "forward" and allocation.died is not None and allocation.died[0] == "backward":
                kept[node] = kept.get(node, 0) + allocation.bytes
        return kept


@purge_leaks()
def profile(
    captured: CollabGraphModule, interface: Interface, example_inputs: ExampleInputs | None = None
) -> Profile:
    """Profile a forward and a backward from the sum of the outputs, in train mode; the model stays as it is.

    Args:
        captured: a captured model.
        interface: its inputs, of known shapes.
        example_inputs: inputs on which a copy of the model really runs if its work depends on their values; by
            default it can't be profiled then.

    Raises:
        Exception: whatever the model raises on these inputs; see `explained`.
    """
    try:
        return _profile(captured, interface, None)
    except DATA_DEPENDENT_ERRORS:
        values = real_values(captured.root, interface, example_inputs)
        if values is None:
            raise
    return replace(_profile(captured, interface, values), on_examples=True)


def _profile(captured: CollabGraphModule, interface: Interface, values: Sequence[Any] | None) -> Profile:
    recorder = _Recorder()
    nodes = {node.name: node for node in captured.modes.train.nodes}  # those of the twin have the same names

    def step(model: CollabGraphModule, *inputs: Tensor) -> None:
        recorder.ignore([inputs, *model.parameters(), *model.buffers()])
        recorder.inputs = sum(tensor.nbytes for tensor in inputs)
        with recorder:
            backward(_Profiler(model, recorder, nodes).run(*inputs))
            recorder.enter(None)

    with torch.inference_mode(False), torch.enable_grad():
        run_on_twin(captured, interface, step, training=True, values=values)
    return recorder.profile(captured.modes.train)


@contextmanager
def explained(model: nn.Module, interface: Interface) -> Iterator[None]:
    """Turn whatever ``model`` raises while it is profiled into a `CaptureError`."""
    try:
        yield
    except FxCollabError:
        raise
    except Exception as error:  # user code may raise anything on a wrong shape
        name = type(model).__qualname__
        if isinstance(error, DATA_DEPENDENT_ERRORS):
            raise CaptureError(
                f"The costs of {name} can't be computed.",
                where=f"{name}.forward",
                why=f"it depends on the values of tensors, and fake tensors have none: {error}",
                hint="give example_inputs with values that the model takes, or name the splits yourself",
            ) from error
        reason = why_not(model, interface, training=True)
        if reason is None:  # such as the backward of torch.cond
            raise CaptureError(
                f"The costs of {name} can't be computed.",
                where=f"{name}.forward and its backward",
                why=f"its forward works, but not while operations are recorded: {one_line(error)}",
                hint="name the splits yourself: transform(model, splits=[...]) needs no costs",
            ) from error
        shapes = ", ".join("x".join(map(str, spec.shape or ())) for spec in interface.inputs)
        raise CaptureError(
            f"{name} fails on input {shapes}.",
            where=f"{name}.forward, in train mode",
            why=reason,
            hint="give what the model takes: example_inputs=(torch.randn(1, 3, 224, 224),) or --input 1x3x224x224",
        ) from error


def backward(outputs: object) -> None:
    """Run the backward from the sum of all tensors in ``outputs`` that require a gradient."""
    leaves = (leaf for leaf in tensors_in(outputs) if leaf.requires_grad)
    reals = [leaf.real if leaf.is_complex() else leaf for leaf in leaves]
    losses = [leaf.sum() if leaf.ndim else leaf for leaf in reals]
    if losses:
        torch.autograd.backward(losses)


class _Profiler(Interpreter):
    """Tells the recorder which node runs: in the forward, and by hooks of autograd's nodes in the backward."""

    def __init__(self, twin: CollabGraphModule, recorder: _Recorder, nodes: Mapping[str, fx.Node]) -> None:
        super().__init__(twin)
        self._recorder, self._nodes = recorder, nodes

    def run_node(self, n: fx.Node) -> Any:
        node = self._nodes[n.name]
        self._recorder.enter(("forward", node))
        value = super().run_node(n)
        if n.op != "output":
            self._recorder.value(node, value)
            _hook_backward(node, value, self._recorder)
        return value


def _hook_backward(node: fx.Node, value: Any, recorder: _Recorder) -> None:
    functions: list[Any] = [leaf.grad_fn for leaf in tensors_in(value)]
    while functions:
        function = functions.pop()
        if function is None or _SEEN in function.metadata or hasattr(function, "variable"):
            continue
        function.metadata[_SEEN] = True  # a set of functions would keep what they saved alive
        function.register_prehook(lambda gradients: recorder.enter(("backward", node)))
        functions += [following for following, _ in function.next_functions]


_SEEN = "fxcollab"


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records for every operation which storage it allocates, and when that is freed."""

    supports_higher_order_operators = True  # such as torch.cond, whose graphs' operations are not seen one by one

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs = 0
        self._moment: Moment | None = None
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._records: list[_Record] = []
        self._living: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()
        self._live = self._peak = self._start = self._flops = 0
        self._costs: dict[fx.Node, dict[str, Any]] = {}
        self._backward: dict[fx.Node, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            return NotImplemented  # the tensor answers
        out = func(*args, **(kwargs or {}))
        self._flops += flops_of(func, args, kwargs or {}, out) if isinstance(func, OpOverload) else 0
        for storage in _storages(out):
            if storage not in self._known:
                self._allocated(storage)
        return out

    def ignore(self, values: Any) -> None:
        """These exist before the step."""
        self._known.update(_storages(values))

    def enter(self, moment: Moment | None) -> None:
        """What follows belongs to ``moment``."""
        if moment == self._moment:
            return
        if self._moment is not None:
            phase, node = self._moment
            cost = self._costs.setdefault(node, {})
            flops, growth = f"{phase}_flops", f"{phase}_bytes"
            cost[flops] = cost.get(flops, 0) + self._flops
            cost[growth] = max(cost.get(growth, 0), self._peak - self._start)
        self._moment, self._flops = moment, 0
        self._start = self._peak = self._live
        if moment is not None and moment[0] == "backward":
            self._backward.setdefault(moment[1])

    def value(self, node: fx.Node, value: Any) -> None:
        """What a node returned."""
        cost = self._costs.setdefault(node, {})
        tensors = [*tensors_in(value)]
        cost["differentiable"] = any(tensor.requires_grad for tensor in tensors)
        cost["floating"] = any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)
        for storage in _storages(tensors):
            if storage in self._living:
                self._living[storage].values[node] = None
        if isinstance(value, Tensor):
            cost |= {"shape": tuple(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    def profile(self, graph: fx.Graph) -> Profile:
        """All that was recorded."""
        allocations = [
            Allocation(record.bytes, record.born, record.died, tuple(record.values))
            for record in self._records
            if record.born is not None and record.died != record.born
        ]
        return Profile(
            {node: NodeCost(**self._costs.get(node, {})) for node in graph.nodes},
            tuple(allocations),
            tuple(self._backward),
            self.inputs,
        )

    def _allocated(self, storage: Any) -> None:
        record = _Record(storage.nbytes(), self._moment)
        self._known.add(storage)
        self._records.append(record)
        self._living[storage] = record
        self._live += record.bytes
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._freed, record).atexit = False

    def _freed(self, record: _Record) -> None:
        record.died = self._moment
        self._live -= record.bytes


@dataclass(eq=False)
class _Record:
    bytes: int
    born: Moment | None
    died: Moment | None = None
    values: dict[fx.Node, None] = field(default_factory=dict)


def _storages(value: Any) -> Iterator[Any]:
    return (leaf.untyped_storage() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
