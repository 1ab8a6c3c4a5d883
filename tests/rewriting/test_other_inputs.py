"""In eval mode, inputs for which the forward takes a different branch than for the example: the original's runs."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.errors import GuardError
from tests.tracing.question_helpers import MORE, Net, X, made, refused


class Losses(Net):
    """Like a detector: a list of any length, and targets in train mode alone; ``scale`` is fixed."""

    def forward(self, xs: list[Tensor], targets: list[Tensor] | None = None, scale: float = 1.0) -> Any:
        if self.training and targets is None:
            raise ValueError("no targets")
        sizes = [x.shape[0] for x in xs]
        out = self.tail(self.a(torch.cat(xs))).split(sizes)
        if targets is None:
            return [part * scale for part in out]
        parts = zip(out, targets, strict=True)
        return {"loss": torch.stack([(part * scale - y).square().mean() for part, y in parts]).sum()}


EXAMPLE = ([X, MORE], [torch.zeros(4, 4), torch.zeros(7, 4)], 2.0)


def test_a_list_of_any_length_is_taken_and_what_is_optional_may_be_left_out() -> None:
    model = Losses()
    train_model = made(model, EXAMPLE)
    fxcollab.verify(model, train_model, EXAMPLE).raise_if_failed()
    sum(output["loss"] for output in train_model(*EXAMPLE[:2])).backward()
    error = refused(lambda: train_model([X], [torch.zeros(4, 4)]))
    assert "drop_last=True" in str(error.hint)
    train_model.eval()
    for graph in (train_model, fxcollab.prune(train_model), copy.deepcopy(train_model)):
        for xs in ([X], [X, MORE], [X, X, X]):
            assert all(map(torch.equal, graph(xs), model(xs, scale=2.0)))
    other = fxcollab.prune(train_model, 1)
    assert all(map(torch.equal, other([X]), fxcollab.prune(train_model, 1, into=Losses().eval())([X], scale=2.0)))
    assert torch.equal(pickle.loads(pickle.dumps(train_model))([X])[0], model([X], scale=2.0)[0])


class AsksTheSum(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return self.tail(h * 2 if x.sum() > 0 else h)


@pytest.mark.parametrize("eval_output", ["mean", "all"])
def test_of_several_heads_other_inputs_are_refused_and_the_pruned_model_takes_them(eval_output: Any) -> None:
    model = AsksTheSum().eval()
    train_model = made(model, (X,), eval_output=eval_output).eval()
    refused(lambda: train_model(-X))
    assert torch.equal(fxcollab.prune(train_model)(-X), model(-X))


def test_a_module_that_replaced_another_is_called() -> None:
    model = AsksTheSum().eval()
    train_model = made(model, (X,)).eval()
    train_model.a = nn.Linear(8, 8).eval()
    reference = copy.deepcopy(model)
    reference.a = train_model.a
    assert torch.equal(train_model(-X), reference(-X))


class Draws(AsksTheSum):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.rand(1))


class Counts(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class CountsInside(AsksTheSum):
    def __init__(self) -> None:
        super().__init__()
        self.a = Counts(8, 8)


def with_a_norm() -> nn.Module:
    model = AsksTheSum()
    model.a = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    return model


@pytest.mark.parametrize("kind", ["draws", "counts", "hooked", "train mode", "own forward"])
def test_what_would_happen_twice_is_refused(kind: str) -> None:
    makes = {"draws": Draws, "counts": CountsInside, "train mode": with_a_norm}
    model = makes.get(kind, AsksTheSum)().eval()
    if kind == "own forward":
        model.forward = types.MethodType(AsksTheSum.forward, model)  # type: ignore[method-assign]
    train_model = made(model, (X,)).eval()
    if kind == "hooked":
        train_model.a.register_forward_hook(lambda *call: None)
    if kind == "train mode":
        train_model.a[1].train()
    train_model(X)
    with pytest.raises(GuardError):
        train_model(-X - 10)


def test_a_graph_that_was_edited_refuses_other_inputs() -> None:
    train_model = made(AsksTheSum(), (X,))
    node = next(node for node in train_model.graph.nodes if node.name == "a")
    with train_model.graph.inserting_after(node):
        doubled = train_model.graph.call_function(torch.mul, (node, 2))
    node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    train_model.recompile()
    for graph in (train_model.eval(), fxcollab.prune(train_model)):
        refused(lambda graph=graph: graph(-X))


class WritesFirst(AsksTheSum):
    def forward(self, x: Tensor) -> Any:
        x.mul_(2)
        return super().forward(x)


class CountsFirst(AsksTheSum):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("make", [WritesFirst, CountsFirst])
def test_nothing_is_written_twice(make: type[Net]) -> None:
    train_model = made(make(), (X.clone(),)).eval()
    with pytest.raises(GuardError):
        train_model(-X)


class AsksForItsSize(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 2 if x.shape[1] == 8 else x)


class Statistics(AsksTheSum):
    """Writes before the question, but in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.norm(x))


def test_what_is_written_in_train_mode_alone_hinders_nothing() -> None:
    model = Statistics()
    train_model = made(model, (X,)).eval()
    assert torch.equal(train_model(-X), model(-X))


@pytest.mark.slow
def test_compiled_eval_mode_takes_other_inputs_too() -> None:
    model = Statistics()
    train_model = torch.compile(made(model, (X,)).eval(), backend="eager")
    assert torch.equal(train_model(X), model(X)) and torch.equal(train_model(-X), model(-X))
    sizes = AsksForItsSize()
    torch.compiler.reset()
    compiled = torch.compile(made(sizes, (X,)).eval(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), sizes(X))


@pytest.mark.slow
def test_a_guard_of_sizes_compiles_with_dynamic_ones() -> None:
    torch.compiler.reset()
    sizes = AsksForItsSize()
    compiled = torch.compile(made(sizes, (X,)).eval(), backend="eager", dynamic=True)
    for x in (X, X[:3], torch.cat([X, X])):
        assert torch.equal(compiled(x), sizes(x))
