"""Batch: a training model whose sibling branches run as one, where that is faster."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab.capture import ExampleInputs
from fxcollab.codegen import CollabGraphModule
from fxcollab.codegen.order import swapped_calls
from fxcollab.codegen.siblings import in_levels, owned_by_level
from fxcollab.costs.attribution import backward
from fxcollab.errors import PatternError
from fxcollab.generators import seeded
from fxcollab.graphs import attribute, place
from fxcollab.partition.effects import EffectAnalysis, track_storages
from fxcollab.plan import plan_of, training_model
from fxcollab.runtime.siblings import siblings_of


@dataclass(frozen=True)
class BatchedTiming:
    """What a step takes, forward and backward.

    Attributes:
        plain: seconds with branches one after the other, the median of the runs.
        batched: seconds with the branches of a level as one.
    """

    plain: float
    batched: float

    @property
    def ratio(self) -> float:
        """How many times faster the branches are as one; below 1 they are slower."""
        return self.plain / self.batched


def batch_branches(train_model: nn.Module) -> CollabGraphModule:
    """A training model over the same state whose branches of a level run as one, under `torch.vmap`.

    Siblings are the same computation with other weights. For a step these are stacked; names, parameters, optimizers
    and checkpoints stay as they are, and so does the graph: prune, verify and diff see no difference. Results are
    equal to rounding. It pays where a kernel takes less time than its launch, as for small networks on a GPU, and
    costs time where kernels are large: `time_batched` tells on your own model, inputs and device.

    Random operations draw for each branch, though not the numbers that they would draw one after the other. Where
    the model is exported or traced again, and under autocast on a CPU, branches run one after the other.

    A call is refused, and leaves the branches as they were, where siblings have come to differ in more than their
    tensors (modes, options), have hooks, or do what does not reach every one of them: fill a container, draw
    Python's or numpy's random numbers, ask for values, checkpoint their own parts, run recurrent layers. What can't
    be noticed: inside a branch no tensor is a ``Parameter`` or has ``requires_grad``, which code may ask for;
    ``F.embedding`` with a padding index, and with indices that depend on the branch or are a buffer of it, has a
    gradient there (``nn.Embedding`` has none); autocast that a branch enters itself on a CPU is lost for
    convolutions; globals and caches of functions keep tensors of all siblings. Under ``torch.compile`` less is
    noticed: call the model once without. Outputs can't be written into in place. Calls in several threads are not
    safe: one sibling's modules hold the tensors of all.

    Args:
        train_model: what `transform` returned; it stays as it is, and shares its state with the result.

    Raises:
        PatternError: its branches are computed again, or would write into a value or call a module with state before
            others that come first in the graph.
        StateError: it is no training model, siblings differ already, or the graph was edited so that they compute
            different things.
    """
    model = training_model(train_model)
    if model.recompute:
        raise PatternError(
            "Branches that are computed again can't run as one.",
            why="recompute='heads' keeps one of them alive at a time",
            hint="transform without recompute, or leave batching out",
        )
    for graph in model.modes:
        _refuse_other_order(graph, model)
        for level in owned_by_level(graph):
            siblings_of([{name: attribute(model, target) for name, target in own.items()} for own in level])
    return model.as_one(True)


def time_batched(
    train_model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    runs: int = 7,
    prepare: Callable[[nn.Module], Callable[..., Any]] | None = None,
) -> BatchedTiming:
    """Measure forward and backward both ways, in turns, on a copy of the training model.

    Args:
        train_model: what `transform` returned, on the device where it will be trained, in the mode to be measured.
        example_inputs: tuple or dict of a whole batch, on that device.
        runs: how many of each kind count, after two that don't.
        prepare: what is done to both before, such as ``torch.compile``.

    Raises:
        PatternError: there is nothing to measure, or as of `batch_branches`.
        StateError: as of `batch_branches`.
        CaptureError: the inputs don't fit the signature.
    """
    if runs < 1:
        raise PatternError(f"Nothing is measured in {runs} runs.", hint="say runs=1 or more; 7 unless given")
    model = copy.deepcopy(training_model(train_model))
    plan = plan_of(model)
    values = plan.interface.values_of(model, example_inputs)
    args, kwargs = plan.interface.call(model, values)
    ways = [model.as_one(False), batch_branches(model)]
    steps = [partial(_step, prepare(way) if prepare else way, args, kwargs) for way in ways]
    with seeded(0):
        for step in (*steps, *steps):
            _seconds(step, values)
        taken = [[_seconds(step, values) for step in steps] for _ in range(runs)]
    return BatchedTiming(*(statistics.median(times) for times in zip(*taken, strict=True)))


def _step(model: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
    backward(model(*args, **kwargs))


def _seconds(step: Callable[[], None], values: Sequence[Any]) -> float:
    devices = {value.device for value in values if isinstance(value, Tensor) and value.is_cuda}
    for device in devices:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _refuse_other_order(graph: fx.Graph, model: CollabGraphModule) -> None:
    """Refuse where level by level state would change, or a value be written in place, before or after its turn."""
    ordered = in_levels(graph)
    swapped = swapped_calls(graph, ordered, model)
    if swapped:
        raise PatternError(
            "Branches can't run as one: a module with state is called in several levels.",
            where=place(swapped[1]),
            why=f"{swapped[1].name!r} would run before {swapped[0].name!r}, and both call the same module",
            hint="leave batching out, or put the splits before or behind all calls of the module",
        )
    before = {node: position for position, node in enumerate(graph.nodes)}
    then = {node: position for position, node in enumerate(ordered)}
    storages = track_storages(graph, EffectAnalysis(model), graph.nodes)
    for write in storages.writes:
        for node in graph.nodes:
            reads = any(storages.roots.get(source, frozenset()) & write.roots for source in node.all_input_nodes)
            if reads and (before[node] < before[write.node]) != (then[node] < then[write.node]):
                raise PatternError(
                    "Branches can't run as one: a value is written in place.",
                    where=place(write.node),
                    why=f"{node.name!r} reads it, and would run on the other side of the write",
                    hint="leave batching out, or compute a new value instead of writing into one",
                )
