"""Of calls of equal modules one is run, and everything that is found is what it is where each is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fxcollab
from fxcollab.costs.profile import Profile, profile
from fxcollab.tracing.examples import forward_flops, run_on_twin
from fxcollab.tracing.interface import InputSpec, Interface
from fxcollab.tracing.repeats import Repeats

INTERFACE = Interface((InputSpec("x", (2, 8, 4, 4), "float32"),))
RUNS = Counter[type[nn.Module]]()


class Block(nn.Module):
    """What is repeated; a subclass says what is odd about it."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        RUNS[type(self)] += 1
        return x + self.act(self.norm(self.conv(x)))


class Drops(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(nn.functional.dropout(x, 0.3, self.training)).sigmoid()


class ReturnsTwo(Block):
    def forward(self, x: Any) -> Any:
        y = super().forward(x[0] if isinstance(x, tuple) else x)
        return y.exp(), y.detach().mean()


class ReturnsInput(Block):
    def forward(self, x: Any) -> Any:
        return x, super().forward(x[1] if isinstance(x, tuple) else x)


class ReturnsView(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x).reshape(2, 8, 16).view(2, 8, 4, 4)[:]


class WritesInput(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x.mul_(2) if not x.requires_grad else x.relu_())


class HasNumber(Block):
    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        return y if self.place % 2 else self.conv(y)


class Counts(Block):
    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.calls = {"n": 0}

    def forward(self, x: Any) -> Any:
        self.calls["n"] += 1
        return super().forward(x)


class CountsOnClass(Block):
    calls = 0

    def forward(self, x: Any) -> Any:
        CountsOnClass.calls += 1  # a twin's class is put back afterwards
        y = super().forward(x)
        return self.conv(y) if CountsOnClass.calls % 2 else y


class FlaggedWeight(Block):
    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.conv.weight.twice = place % 2 == 0  # type: ignore[attr-defined]

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        return self.conv(y) if self.conv.weight.twice else y  # type: ignore[attr-defined]


class Checkpointed(Block):
    def forward(self, x: Any) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False)


class Unused(Block):
    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.unused = nn.Parameter(torch.zeros(1000))


class Frozen(Block):
    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.conv.requires_grad_(place > 1)


class Model(nn.Module):
    def __init__(self, cls: type[Block], count: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 1)
        self.blocks = nn.Sequential(*(cls(place) for place in range(count)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.blocks(self.stem(x))
        while isinstance(found, tuple):
            found = found[-1] if found[-1].ndim else found[0]
        out: Tensor = self.head(found.mean((2, 3)))
        return out


class Shared(Model):
    def __init__(self, cls: type[Block]) -> None:
        super().__init__(cls, 2)
        self.blocks.extend([*self.blocks, *self.blocks])


def hooked(cls: type[Block]) -> Model:
    model = Model(cls)
    model.blocks[2].register_forward_hook(lambda module, args, out: out * 2)
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: (lambda cls=cls: Model(cls)) for cls in (Block, *Block.__subclasses__())},
    "shared": lambda: Shared(Block),
    "hooked": lambda: hooked(Block),
}
REPEATED = {
    *("Block", "Drops", "ReturnsTwo", "ReturnsView", "FlaggedWeight", "Checkpointed", "Unused", "Frozen"),
    *("shared", "hooked"),
}


def each_run(repeats: Repeats, module: nn.Module, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
    return run(), None


def costs(found: Profile) -> Any:
    allocations = Counter((one.bytes, one.born, one.died, one.values) for one in found.allocations)
    return {node: asdict(cost) for node, cost in found.nodes.items()}, allocations, found.backward


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_is_what_running_each_finds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = fxcollab.capture(KINDS[kind](), splits=("blocks.1",), interface=INTERFACE)
    found = costs(profile(captured, INTERFACE))
    monkeypatch.setattr(Repeats, "run", each_run)
    assert found == costs(profile(captured, INTERFACE))


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_modules_are_those_of_the_counter(kind: str) -> None:
    model, counter = KINDS[kind](), FlopCounterMode(display=False)
    run_on_twin(model, INTERFACE, lambda twin, x: count(twin, x, counter))
    expected = {name.partition(".")[2]: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    found = {name: flops for name, flops in forward_flops(model, INTERFACE).items() if flops}
    assert found == {name: flops for name, flops in expected.items() if flops and name} | {
        "": counter.get_total_flops()
    }


def count(twin: nn.Module, x: Tensor, counter: FlopCounterMode) -> None:
    with counter:
        twin(x)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_modules_run_once_unless_they_may_differ(kind: str) -> None:
    model = KINDS[kind]()
    RUNS.clear()
    forward_flops(model, INTERFACE)
    [runs] = RUNS.values()
    assert runs < 5 if kind in REPEATED else runs == 5
