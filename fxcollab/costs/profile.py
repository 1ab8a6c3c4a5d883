"""One training step of a captured model, watched on fake tensors: what each node costs.

Every instance of a node costs what the node costs, so the profile of the original holds all that is needed to
count any head tree over it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from fxcollab._torch import TorchDispatchMode, pytree
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.attribution import Attributed, Moment, backward
from fxcollab.tracing.examples import run_on_fakes
from fxcollab.tracing.interface import Interface


@dataclass(frozen=True, eq=False)
class Allocation:
    """Storage that outlives the moment in which it is made.

    Attributes:
        bytes: its size.
        born: the phase and the node that made it.
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
        forward_flops, backward_flops: floating point operations, as ``FlopCounterMode`` counts them.
        forward_bytes, backward_bytes: by how much memory grows at most while the node is run.
        shape: of the value, where that is one tensor.
        dtype: its type, such as ``"float32"``.
        differentiable: whether the value carries a gradient.
        floating: whether there is a floating-point or complex tensor in it.
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
    def flops(self) -> int:
        """Of a whole step."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True, eq=False)
class Profile:
    """What a training step of a captured model costs, node by node.

    Attributes:
        nodes: the cost of every node of the train mode's graph.
        allocations: what is kept from one node to another, in the order in which it was made.
        backward: the nodes in the order in which their backward runs.
        inputs: the bytes of the inputs.
    """

    nodes: Mapping[fx.Node, NodeCost]
    allocations: tuple[Allocation, ...]
    backward: tuple[fx.Node, ...]
    inputs: int


def profile(captured: CollabGraphModule, interface: Interface) -> Profile:
    """Watch one step, forward and backward from the sum of the outputs, in train mode.

    Nothing is computed and the model stays as it is.

    Args:
        captured: a captured model.
        interface: its inputs, of known shapes.

    Raises:
        Exception: whatever the model raises on these inputs.
    """
    watch = _Watch()

    def step(model: CollabGraphModule, *inputs: Tensor) -> None:
        watch.know([inputs, *model.parameters(), *model.buffers()])
        watch.inputs = sum(tensor.nbytes for tensor in inputs)
        counter = FlopCounterMode(display=False)
        untracked: Any = _NoModules()
        counter.mod_tracker = untracked  # hooks on modules' outputs would hold on to what these saved
        with counter, watch:
            watch.count = counter.get_total_flops
            backward(Attributed(model, watch.enter, watch.value).run(*inputs))
            watch.enter(None)

    with captured.in_mode(True), torch.inference_mode(False), torch.enable_grad():
        run_on_fakes(captured, interface, run=step)
        return watch.profile(captured.graph)


class _NoModules(AbstractContextManager["_NoModules"]):
    """In the place of a tracker of modules: all is counted as one."""

    parents = frozenset({"Global"})

    def __exit__(self, *error: object) -> None:
        return None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation: which storage it makes, and when that is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Callable[[], int] = lambda: 0
        self.inputs = 0
        self._moment: Moment | None = None
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._records: list[_Record] = []
        self._living: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()
        self._live = self._peak = self._start = self._flops_before = 0
        self._costs: dict[fx.Node, dict[str, Any]] = {}
        self._backward: dict[fx.Node, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._born(storage)
        return out

    def know(self, values: Any) -> None:
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
            cost[flops] = cost.get(flops, 0) + self.count() - self._flops_before
            cost[growth] = max(cost.get(growth, 0), self._peak - self._start)
        self._moment, self._flops_before = moment, self.count()
        self._start = self._peak = self._live
        if moment is not None and moment[0] == "backward":
            self._backward.setdefault(moment[1])

    def value(self, node: fx.Node, value: Any) -> None:
        """What a node gave."""
        cost = self._costs.setdefault(node, {})
        leaves = pytree.tree_leaves(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        cost["differentiable"] = any(tensor.requires_grad for tensor in tensors)
        cost["floating"] = any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)
        for storage in _storages(value):
            if storage in self._living:
                self._living[storage].values[node] = None
        if isinstance(value, Tensor):
            cost |= {"shape": tuple(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    def profile(self, graph: fx.Graph) -> Profile:
        """All that was seen."""
        kept = (r for r in self._records if r.born is not None and r.died != r.born)
        return Profile(
            {node: NodeCost(**self._costs.get(node, {})) for node in graph.nodes},
            tuple(Allocation(r.bytes, r.born, r.died, tuple(r.values)) for r in kept if r.born is not None),
            tuple(self._backward),
            self.inputs,
        )

    def _born(self, storage: Any) -> None:
        record = _Record(storage.nbytes(), self._moment)
        self._known.add(storage)
        self._records.append(record)
        self._living[storage] = record
        self._live += record.bytes
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._died, record).atexit = False

    def _died(self, record: _Record) -> None:
        record.died = self._moment
        self._live -= record.bytes


@dataclass(eq=False)
class _Record:
    bytes: int
    born: Moment | None
    died: Moment | None = None
    values: dict[fx.Node, None] = field(default_factory=dict)


def _storages(value: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
