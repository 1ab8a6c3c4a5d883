"""What capture opens and what it keeps whole, at either granularity."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import CaptureError, SplitError
from tests.tracing.capture_helpers import Block, Net, X, operations

# -------------------------------------------------------------------------------------------- lazy opening


def test_only_the_root_is_opened_for_a_split_at_its_child() -> None:
    captured = fxcollab.capture(Net(), ["stem"])
    assert operations(captured.graph) == [
        ("call_module", "stem"),
        ("call_module", "body"),
        ("call_module", "head"),
    ]


def test_every_module_around_a_split_is_opened_and_no_other() -> None:
    captured = fxcollab.capture(Net(), ["body.0.first"])
    assert operations(captured.graph) == [
        ("call_module", "stem"),
        ("call_module", "body.0.first"),
        ("call_module", "body.0.act"),
        ("call_module", "body.0.second"),
        ("call_function", str(operator.add)),
        ("call_module", "body.1"),
        ("call_module", "head"),
    ]


def test_op_granularity_opens_down_to_torchs_layers() -> None:
    captured = fxcollab.capture(Net(), granularity="op")
    called = [target for op, target in operations(captured.graph) if op == "call_module"]
    assert called == [
        "stem", "body.0.first", "body.0.act", "body.0.second", "body.1.first", "body.1.act", "body.1.second",
        "head",
    ]  # fmt: skip


def test_modules_and_tensors_are_the_callers_own() -> None:
    model = Net()
    captured = fxcollab.capture(model, ["body.0"])
    assert captured.root is model
    assert all(captured.get_submodule(path) is module for path, module in model.named_modules() if path)
    own, found = model.state_dict(keep_vars=True), captured.state_dict(keep_vars=True)
    assert list(own) == list(found)
    assert all(found[key] is own[key] for key in own)


def test_kept_modules_keep_class_and_hooks() -> None:
    model, calls = Net(), []
    model.body.register_forward_hook(lambda *_: calls.append("body"))
    captured = fxcollab.capture(model, ["stem"])
    assert not calls
    assert torch.equal(captured(X), model(X))
    assert calls == ["body", "body"]
    assert type(captured.body) is nn.Sequential


def test_unused_state_and_aliases_are_kept() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)
            self.alias = self.stem
            self.register_buffer("hidden", torch.ones(2), persistent=False)
            self.register_buffer("shown", torch.ones(2))

    model = Unused()
    captured = fxcollab.capture(model, ["stem"])
    assert list(captured.state_dict()) == list(model.state_dict())
    assert captured.alias is captured.stem
    assert dict(captured.named_buffers()).keys() == {"hidden", "shown"}


def test_a_graph_captured_at_one_batch_size_runs_at_another() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x.reshape(x.shape[0], -1))

    model = Flat()
    captured = fxcollab.capture(model, ["stem"], (torch.randn(2, 2, 4),))
    x = torch.randn(7, 2, 4)
    assert torch.equal(captured(x), model(x))


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(CaptureError, match="There is no granularity 'layer'"):
        fxcollab.capture(Net(), granularity="layer")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- op granularity


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(4, 4), Block()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        x = torch.sin(self.body(x)) * 2
        return self.head(x)


@pytest.mark.parametrize("splits", [["gelu"], ["sin"], ["gelu", "add"], ["gelu", "body"], ["body.act", "mul"]])
def test_a_split_inside_a_forward(splits: list[str]) -> None:
    model = Functional()
    train_model = fxcollab.transform(model, splits=splits, granularity="op", seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    pruned = fxcollab.prune(train_model)
    assert fx.symbolic_trace(pruned).code == fx.symbolic_trace(model).code


def test_a_functional_value_of_the_opened_root_needs_no_op_granularity() -> None:
    model = Functional()
    train_model = fxcollab.transform(model, splits=["gelu"], seed=0)
    assert ("call_module", "body") in operations(fxcollab.prune(train_model).graph)
    with pytest.raises(SplitError):
        fxcollab.transform(model, splits=["add"])


class Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        torch._assert(x.dim() == 2, f"expected {{N, 3}}, got {x.shape} of {x.dim():03d} dimensions")
        return self.head(x)


def test_a_message_shows_the_values_of_the_call_and_not_the_proxies() -> None:
    train_model = fxcollab.transform(Asserting(), splits=["body"], pattern="simple")
    with pytest.raises(AssertionError, match=r"expected \{N, 3\}, got torch.Size\(\[3\]\) of 001 dimensions"):
        train_model(torch.ones(3))


class PlainlyAsserting(Asserting):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        torch._assert(x.dim() == 2, f"got {x.shape}")  # without a format, which plain fx can't trace
        return self.head(x)


def test_a_message_traces_again_to_what_plain_fx_traces() -> None:
    model = PlainlyAsserting()
    pruned = fxcollab.prune(fxcollab.transform(model, splits=["body"], pattern="simple"))
    assert fx.symbolic_trace(pruned).code == fx.symbolic_trace(model).code


def test_a_message_compiles_into_the_full_graph() -> None:
    train_model = fxcollab.transform(Asserting(), splits=["body"], pattern="simple")
    compiled = torch.compile(train_model, fullgraph=True, backend="eager")
    for one, other in zip(compiled(torch.ones(2, 3)), train_model(torch.ones(2, 3)), strict=True):
        assert torch.equal(one, other)
