"""Looking at a model leaves it as it was, whatever its own Python does meanwhile."""

from __future__ import annotations

import functools
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.deep_copy import deep_copy
from fxcollab.tracing.twin import clone_of

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Stages(nn.Module):
    """``first``, ``middle`` and ``last``; a subclass says what is odd about the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


class MergesOnEval(Stages):
    """Adds a product of low rank to a weight in eval mode, as LoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))
        self.merged = False

    def train(self, mode: bool = True) -> MergesOnEval:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.middle.weight += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = self.middle(x)
        return self.last(torch.relu(y if self.merged else y + F.linear(x, self.up @ self.down)))


class Folding(nn.Module):
    """Two branches that ``eval`` folds into one, through ``.data``, as RepVGG's do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.folded = nn.Linear(4, 4), nn.Linear(4, 4), False

    def eval(self) -> Folding:
        return self.train(False)

    def train(self, mode: bool = True) -> Folding:
        if mode == self.folded:
            sign = -1 if mode else 1
            self.one.weight.data = self.one.weight.data + sign * self.other.weight.data
            self.one.bias.data += sign * self.other.bias.data
            self.folded = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if self.folded else self.one(x) + self.other(x)


class Folds(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.middle = Folding()


class SwapsTheAverage(Stages):
    """Evaluates with an average of the weights, which it exchanges for the weights in ``eval``."""

    def __init__(self) -> None:
        super().__init__()
        self.average = {name: torch.randn_like(p) for name, p in self.named_parameters()}

    def train(self, mode: bool = True) -> SwapsTheAverage:
        if mode != self.training:
            for name, parameter in self.named_parameters():
                held = parameter.data.clone()
                parameter.data.copy_(self.average[name])
                self.average[name] = held
        return super().train(mode)


class ReplacesWhatItHas(Stages):
    """Sets new parameters and modules in ``train``."""

    def train(self, mode: bool = True) -> ReplacesWhatItHas:
        self.middle.weight = nn.Parameter(self.middle.weight.detach() * 2)
        self.last = nn.Linear(4, 3)
        self.register_buffer("mode", torch.tensor(mode))
        return super().train(mode)


class Counts(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log, self.recent, self.seen = 0, [], deque(maxlen=3), set()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.log.append(self.calls)
        self.recent.append(x)
        self.seen.add(self.training)
        return super().forward(x)


class Notes:
    def __init__(self) -> None:
        self.last, self.all = None, []


class Caches(Stages):
    """Keeps what it computes in a dict, in an object and on a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.notes = {"kept": torch.ones(2)}, Notes()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.cache["x"] = self.notes.last = self.middle.given = x
        self.notes.all.append(x)
        self.cache.setdefault("table", torch.arange(4.0))
        return self.last(torch.relu(self.middle(x + self.cache["table"])))


class HooksFillADict(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.features = {}
        self.first.register_forward_hook(lambda module, inputs, output: self.features.update(first=output))
        self.middle.register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.features.setdefault("before", []).append(inputs[0])


class ChangesItsClass(Stages):
    instances, calls, table = [], 0, {}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        self.instances.append(x)
        self.table["x"] = x
        type(self).late = x
        return super().forward(x)


class HoldsALock(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.calls += 1
            return super().forward(x)


class PlainLists(Stages):
    """Parameters that lie in a list and in a dict, and are registered nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))]
        self.shifts = {"a": nn.Parameter(torch.rand(4)), "b": [torch.rand(4)]}

    def train(self, mode: bool = True) -> PlainLists:
        with torch.no_grad():
            self.scales[0] *= 2
            self.shifts["b"][0].add_(1)
        return super().train(mode)


class OldWeightNorm(Stages):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.first = nn.utils.weight_norm(self.first)
            self.middle = nn.utils.weight_norm(self.middle)


class OwnGenerator(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.middle = Jitter()


class Jitter(nn.Module):
    """Draws from a generator of its own, kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(4, generator=self.generator)


class HandsOnItsMode(Stages):
    """Tells another object of every change of mode, whose list is not an attribute of any module."""

    def __init__(self) -> None:
        super().__init__()
        self.log = []
        self.tell = (lambda log: lambda mode: log.append(mode))(self.log)

    def train(self, mode: bool = True) -> HandsOnItsMode:
        self.tell(mode)
        return super().train(mode)


MODELS = [
    MergesOnEval, Folds, SwapsTheAverage, ReplacesWhatItHas, Counts, Caches, HooksFillADict, ChangesItsClass,
    HoldsALock, PlainLists, OldWeightNorm, OwnGenerator, HandsOnItsMode,
]  # fmt: skip


def facts(model: nn.Module) -> dict[str, Any]:
    """All that is reached from a model, by paths: identities, and values of tensors, numbers and generators."""
    return dict(_facts("", model, set()))


def _facts(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    yield path, id(value)
    if isinstance(value, Tensor):
        yield f"{path}: values", (value.tolist(), value.requires_grad, value._version, id(value.grad))
    elif isinstance(value, torch.Generator):
        yield f"{path}: state", value.get_state().tolist()
    elif isinstance(value, bool | int | float | str | type | type(None) | types.ModuleType):
        yield f"{path}: value", value
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            yield f"{path}: keys", list(map(str, value))
            members = {f"[{key!r}]": member for key, member in value.items()}
        elif isinstance(value, list | tuple | set | deque):
            yield f"{path}: length", len(value)
            members = {f"[{index}]": member for index, member in enumerate(value)}
        elif isinstance(value, types.FunctionType):
            members = {f"({i})": cell.cell_contents for i, cell in enumerate(value.__closure__ or ())}
        elif isinstance(value, types.MethodType):
            members = {".self": value.__self__}
        else:
            members = {f".{name}": held for name, held in getattr(value, "__dict__", {}).items()}
            own = {k: v for k, v in vars(type(value)).items() if not k.startswith("__")} if isinstance(value, Stages) else {}
            members |= {f".class.{name}": held for name, held in own.items() if not callable(held)}
        for key, member in members.items():
            yield from _facts(path + key, member, seen)


def made(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_looked_at_is_bit_for_bit_as_before(cls: type[nn.Module], training: bool) -> None:
    model = made(cls).train(training)
    before = facts(model)

    def changes() -> list[str]:
        now = facts(model)
        return [key for key in {**before, **now} if before.get(key, facts) != now.get(key, facts)]

    fxcollab.capture(model, ["first"])
    assert changes() == []
    fxcollab.choose_splits(model, (X,), fanouts=(2,))
    assert changes() == []
    fxcollab.training_costs(model, splits=["first"], example_inputs=(X,))
    assert changes() == []
    train_model = fxcollab.transform(model, splits=["first"], seed=0, init="copy-anyway")
    assert changes() == []
    fxcollab.verify(model, train_model, (X,))
    assert changes() == []
