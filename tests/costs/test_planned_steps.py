"""A training step over any head tree, counted before it is built."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils.flop_counter import FlopCounterMode

import fxcollab
from fxcollab.costs.costs import Levels, StepCost, parameter_count, step_cost
from fxcollab.costs.profile import backward, profile
from fxcollab.plan import plan_of
from fxcollab.tracing.examples import run_on_twin
from fxcollab.tracing.interface import InputSpec, Interface
from samples.networks.resnet_cifar import resnet20
from tests.costs.helpers import Cifar
from tests.speeds import slow_but
from tests.untouched import Untouched

# A training step over any head tree, counted before it is built.


class Dense(nn.Module):
    """Skips, a side branch, an activation in place and an auxiliary output in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.side, self.fc, self.auxiliary = nn.Conv2d(8, 8, 1), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.relu(self.norm(self.one(x)))
        z = self.two(torch.cat([x, y], 1))
        z = z * torch.sigmoid(self.side(z))
        logits = self.fc(z.mean((2, 3)))
        return (logits, self.auxiliary(y.mean((2, 3)))) if self.training else logits


STEPS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str]]] = {
    "cifar": (Cifar, ("layer1", "layer2")),
    "dense": (Dense, ("one", "two")),
    "resnet20": (resnet20, ("stage1", "stage2")),
}
TREES: dict[str, dict[str, Any]] = {
    "hierarchical": {"pattern": "hierarchical"},
    "fan-outs": {"pattern": "hierarchical", "fanouts": (3, 2)},
    "simple": {"pattern": "simple", "heads": 4},
    "instances": {"pattern": "multi-instance", "heads": 3},
}


def built_and_counted(network: str, tree: str) -> tuple[fxcollab.CollabGraphModule, Interface, StepCost]:
    make, names = STEPS[network]
    options = TREES[tree]
    splits = {"hierarchical": names, "simple": names[:1], "multi-instance": ()}[options["pattern"]]
    with torch.device("meta"):
        model = make()
    interface = Interface((InputSpec("x", (16, 3, 32, 32), "float32"),))
    train_model = fxcollab.transform(model, splits=splits, seed=0, **options)
    captured = fxcollab.capture(model, splits)
    cut = fxcollab.partition(captured, plan_of(train_model).tree)
    return (
        train_model,
        interface,
        step_cost(captured, profile(captured, interface), Levels.of(captured, cut), optimizer=0),
    )


@pytest.mark.parametrize("tree", slow_but(["simple"], TREES))
@pytest.mark.parametrize("network", slow_but(["dense"], STEPS))
def test_flops_and_parameters_of_a_step_are_those_of_the_built_graph(network: str, tree: str) -> None:
    train_model, interface, cost = built_and_counted(network, tree)
    counter = FlopCounterMode(display=False)

    def step(model: nn.Module, *inputs: Tensor) -> None:
        with counter:
            backward(model(*inputs))

    with train_model.in_mode(True):
        run_on_twin(train_model, interface, run=step)
    assert cost.flops == counter.get_total_flops()
    assert cost.parameters == parameter_count(train_model)


@pytest.mark.slow
@pytest.mark.parametrize("tree", slow_but(["simple"], TREES))
def test_the_peak_of_a_steps_memory_is_that_of_the_built_graph(tree: str) -> None:
    train_model, interface, cost = built_and_counted("resnet20", tree)
    peaks: list[int] = []

    def step(model: nn.Module, *inputs: Tensor) -> None:
        tracker = MemTracker()
        tracker.track_external(model, *inputs)
        with tracker:
            backward(model(*inputs))
        peaks.extend(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())

    with train_model.in_mode(True):
        run_on_twin(train_model, interface, run=step)
    assert cost.memory == pytest.approx(peaks[0], rel=0.05)


@pytest.mark.parametrize("tree", slow_but(["hierarchical"], TREES))
def test_the_peak_of_a_steps_memory_is_what_the_allocator_gives(tree: str) -> None:
    planned, _, cost = built_and_counted("resnet20", tree)
    train_model = fxcollab.transform(
        resnet20().train(), splits=plan_of(planned).tree.splits, seed=0, **TREES[tree]
    )  # on a device, unlike what was counted
    x = torch.randn(16, 3, 32, 32)
    held = [*train_model.parameters(), *train_model.buffers(), x]
    peak = sum(tensor.nbytes for tensor in held) + allocated(lambda: backward(train_model(x)))
    assert cost.memory == pytest.approx(peak, rel=0.1)


def allocated(call: Callable[[], None]) -> int:
    """The most bytes that the allocator has given out at any time."""
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    waiting, sizes = list(recorded.profiler.kineto_results.experimental_event_tree()), dict[int, int]()
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            sizes[event.start_time_ns] = sizes.get(event.start_time_ns, 0) + event.extra_fields.alloc_size
    return max(accumulate(sizes[time] for time in sorted(sizes)))


def test_a_profile_leaves_the_model_as_it_is() -> None:
    model = Dense().eval()
    captured = fxcollab.capture(model, ["one"])
    untouched = Untouched(model)
    profile(captured, Interface((InputSpec("x", (2, 3, 8, 8), "float32"),)))
    assert untouched.differences() == []


def test_nothing_is_held_once_costs_are_known() -> None:
    model = resnet20()
    gone = weakref.ref(model)
    fxcollab.training_costs(model, splits=["stage1"], example_inputs=(torch.rand(2, 3, 8, 8),))
    del model
    gc.collect()
    assert gone() is None


class Probed(nn.Module):
    """A value that nothing uses: what it would need for a backward is let go of with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.probe, self.head = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.probe(x)
        return self.head(x * 2)


def test_what_no_backward_needs_is_let_go_of() -> None:
    captured = fxcollab.capture(Probed(), ("stem",))
    found = profile(captured, Interface((InputSpec("x", (2, 3), "float32"),)))
    died = {allocation.born: allocation.died for allocation in found.allocations}
    died_of = {born.name: death for (phase, born), death in died.items() if phase == "forward"}
    assert "probe" not in died_of
    assert died_of["stem"] is not None and died_of["stem"][1].name == "mul"
