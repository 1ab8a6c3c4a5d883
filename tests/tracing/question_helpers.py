"""A small network, and what tests of an opened forward's questions share."""

from __future__ import annotations

import copy
import linecache
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CaptureError, CollabGraphModule, SplitError
from tests.speeds import slow_but

THE_REAL_TORCH, THE_REAL_FINFO, THE_REAL_ONES = torch, torch.finfo, torch.ones
X = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.1
MORE = torch.rand(7, 8, generator=torch.Generator().manual_seed(1)) + 0.1
NOTES = "fxcollab_limitations"
GIVEN_OR_GUESSED = slow_but(["given"], [pytest.param((X,), id="given"), pytest.param(None, id="guessed")])


class Net(nn.Module):
    """Four layers; the split is at the second, and the heads are the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        return self.tail(self.a(x))

    def tail(self, h: Tensor) -> Any:
        return self.d(self.c(self.b(h)).relu())


def made(model: nn.Module, inputs: Any = None, splits: Sequence[str] = ("b",), **options: Any) -> CollabGraphModule:
    """The training model of two heads; what was given up is not warned of here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "limitation")
        return fxcollab.transform(model, "simple", splits, example_inputs=inputs, seed=0, **options)


def proven(model: nn.Module, inputs: Any = (X,), splits: Sequence[str] = ("b",), **options: Any) -> CollabGraphModule:
    """The training model, after every line of the proof was seen to hold."""
    train_model = made(model, inputs, splits, **options)
    fxcollab.verify(model, train_model, inputs).raise_if_failed()
    return train_model


def proven_or_refused(model: nn.Module, inputs: Any = (X,), splits: Sequence[str] = ("b",)) -> None:
    """A refusal is fine where a wrong training model is the alternative."""
    try:
        train_model = made(model, inputs, splits)
    except (CaptureError, SplitError) as error:
        assert error.why and error.hint
        return
    fxcollab.verify(model, train_model, inputs).raise_if_failed()


def agrees(train_model: nn.Module, model: nn.Module, *inputs: Any) -> bool:
    """Whether head 0 returns what the model does; each gets inputs of its own."""
    return torch.equal(fxcollab.all_heads(train_model)(*copy.deepcopy(inputs))[0], model(*copy.deepcopy(inputs)))


def line_at(where: str | None, module: str) -> str:
    """The text of the module's line that an error names, with the module's path or its name."""
    file = str(sys.modules[module].__file__)
    place = re.match(r"(.*):(\d+)(, in .*)?$", str(where))
    assert place and place[1] in (file, module), where
    return linecache.getline(file, int(place[2])).strip()


def refused(call: Callable[[], Any]) -> CaptureError:
    """The refusal, which says all that it should."""
    with pytest.raises(CaptureError) as caught:
        call()
    error = caught.value
    assert error.what and error.where and error.why and error.hint
    return error


def targets(train_model: CollabGraphModule) -> list[Any]:
    return [node.target for node in train_model.graph.nodes if node.op.startswith("call_")]
