"""Small models for saving, and comparisons of what comes back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.errors import ArtifactError, FxCollabError
from fxcollab.plan import plan_of
from fxcollab.sources.load import load as load_source
from fxcollab.sources.source import Source


class Net(nn.Module):
    """Three layers with statistics, for splits at ``a`` and ``b``."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(3, width)
        self.b = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.c = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Tied(nn.Module):
    """An embedding whose weight is the decoder's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 6, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.mix(self.embed(tokens)))


class TwoModes(nn.Module):
    """Returns an auxiliary output in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.aux = nn.Linear(4, 2)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        if self.training:
            return self.c(x), self.aux(x)
        return self.c(x)


class Registered(nn.Module):
    """A root with parameters and buffers of its own, one that no one saves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.a = nn.Linear(3, 4)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.passing) * self.scale


def made(model: Callable[[], nn.Module] | nn.Module = Net, *splits: str, **options: Any) -> Any:
    options.setdefault("seed", 1)
    with seeded(0):
        return fxcollab.transform(model, splits=splits or ("a",), **options)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def randomised(train_model: Any) -> Any:
    """With every value changed, so that nothing comes back by being initialised alike."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in train_model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
    return train_model


def assert_same(one: Any, other: Any, *inputs: Tensor, rounding: float = 0) -> None:
    """Names, order, values, types, plan, code, and outputs in both modes, these up to ``rounding``."""
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
    assert replace(plan_of(one), source=None) == replace(plan_of(other), source=None)
    assert [graph_code(g) for g in one.modes] == [graph_code(g) for g in other.modes]
    for training in (False, True):
        outputs = [fxcollab.all_heads(copy.deepcopy(model).train(training))(*inputs) for model in (one, other)]
        torch.testing.assert_close(*outputs, rtol=rounding, atol=0)


def graph_code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(function: Callable[..., Any], *arguments: Any, **options: Any) -> FxCollabError:
    with pytest.raises(FxCollabError) as caught:
        function(*arguments, **options)
    assert isinstance(caught.value, ArtifactError), caught.value
    return caught.value


_numbers = itertools.count()

SOURCE = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=4):
            super().__init__()
            self.a = nn.Linear(3, width)
            self.c = nn.Linear(width, 2)

        def forward(self, x):
            return self.c(self.a(x).relu())
"""


def saved_from(file: Path, directory: Path, **arguments: Any) -> Any:
    loaded = load_source(Source.parse(str(file), arguments))
    train_model = made(loaded.model, factory=loaded.factory, source=loaded.source)
    fxcollab.save(train_model, directory)
    return train_model
