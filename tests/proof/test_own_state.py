"""Verify on models that keep state in attributes, fail on their own, or freeze what they should compute."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CollabGraphModule, Report
from tests.speeds import slow_but

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
GRADIENTS = "gradients are the mean over separate originals"


def verified(model: nn.Module, inputs: tuple[Tensor, ...] = (X,), **options: Any) -> Report:
    options = {"splits": ["0"], **options}
    return fxcollab.verify(model, fxcollab.transform(model, seed=0, **options), inputs)


def failed(report: Report) -> list[str]:
    return [check.name for check in report if not check.ok]


def around(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))


# -------------------------------------------------------------------------------------- state in attributes


class Stateful(nn.Module):
    """A recurrent network goes on from its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.GRUCell(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x, self.state)
        self.state = y.detach()
        return y


class FirstBatch(nn.Module):
    """The first batch that it trains on sets its offset."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.done = nn.Parameter(torch.zeros(4)), False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.done:
            self.offset.data.copy_(-x.mean(0))
            self.done = True
        return x + self.offset


class Counts(nn.Module):
    """Its calls are counted in a dict, and change what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"calls": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["calls"][0] += 1
        return x * self.seen["calls"][0]


class Accumulates(nn.Module):
    """Writes into a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.detach().mean(0).to(self.total.dtype))
        return x + self.total


@pytest.mark.filterwarnings("ignore:no module initialises")
@pytest.mark.parametrize("kind", [Stateful, FirstBatch, Counts, Accumulates])
def test_state_in_attributes_starts_as_it_is_in_every_run(kind: type[nn.Module]) -> None:
    model = around(kind())
    verified(model).raise_if_failed()
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    for scale in (1, 2):  # peers have state of their own from here on
        sum(output.sum() for output in train_model.train()(scale * X)).backward()
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_an_attribute_of_a_peer_that_is_no_state_is_compared() -> None:
    model = around(Stateful())
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    train_model(X)
    train_model.get_submodule("peers.b1.1.cell").register_forward_hook(lambda module, args, output: output * 2)
    assert "head 1 in eval mode equals the original with head 1's weights" in failed(
        fxcollab.verify(model, train_model, (X,))
    )


def serves(model: nn.Module, train_model: nn.Module) -> None:
    model(X)
    train_model(X)


def saves(model: nn.Module, train_model: nn.Module) -> None:
    copy.deepcopy(train_model).load_state_dict(train_model.state_dict())


def verifies(model: nn.Module, train_model: nn.Module) -> None:
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


@pytest.mark.parametrize("use", [serves, saves, verifies])
def test_other_threads_may_use_the_models_meanwhile(use: Callable[[nn.Module, nn.Module], None]) -> None:
    model = around(nn.BatchNorm1d(4)).eval()
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    stop, errors = threading.Event(), list[Exception]()

    def serve() -> None:
        while not stop.is_set():
            try:
                use(model, train_model)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        report = fxcollab.verify(model, train_model, (X,))
    finally:
        stop.set()
        thread.join()
    assert report.raise_if_failed() and not errors


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @functools.cached_property
    def table(self) -> Tensor:
        return torch.arange(4.0)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) * self.table


@pytest.mark.parametrize(
    "make",
    [
        Cached,
        lambda: torch.jit.script(nn.Linear(4, 4)),
        lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), X),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_modules_that_set_attributes_themselves_are_proved_in_every_head(make: Callable[[], nn.Module]) -> None:
    assert not verified(around(make())).raise_if_failed().not_checked


# -------------------------------------------------------------------------------------------- sparse gradients


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_compared(layer: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(layer(10, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 2))
    tokens = (torch.tensor([[1, 2, 2], [3, 1, 0]]),)
    train_model = fxcollab.transform(model, splits=["1"], seed=0)
    fxcollab.verify(model, train_model, tokens).raise_if_failed()
    [node] = [node for node in train_model.graph.nodes if node.target is fxcollab.rescale]
    node.args = (node.args[0], 1.0)
    train_model.recompile()
    assert failed(fxcollab.verify(model, train_model, tokens)) == [GRADIENTS]


# ----------------------------------------------------------------------------------- models that fail themselves


class Does(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError("no backward yet")


def in_training_only(module: nn.Module, x: Tensor) -> Tensor:
    if module.training:
        raise RuntimeError("for inference alone")
    return x


OWN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str, str]] = {
    "backward": (lambda module, x: NoBackward.apply(x), GRADIENTS, "the original itself raises NotImplementedError"),
    "training": (
        in_training_only,
        "head 1 in train mode equals the original with head 1's weights",
        "the original itself raises RuntimeError: for inference alone",
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_model_that_fails_on_its_own_is_told_from_a_fault(kind: str) -> None:
    function, name, why = OWN[kind]
    report = verified(around(Does(function)))
    [check] = [check for check in report.not_checked if check.name == name]
    assert why in check.detail
    assert report.raise_if_failed() and f"-      {name}: not checked: {why}" in str(report)


def test_of_another_object_only_what_holds_is_said() -> None:
    model, other = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2))
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    names = [check.name for check in fxcollab.verify(other, train_model, (X,))]
    assert "head 0 in train mode equals the original with head 0's weights" in names
    [failed] = [check for check in fxcollab.verify(other, train_model, (X,)) if not check.ok]
    assert "fxcollab.original(train_model)" in failed.detail


def test_nothing_is_proved_where_the_original_runs_in_neither_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    report = fxcollab.verify(model, train_model, (X.long(),))  # which fake tensors take
    assert not report
    [failed] = [check for check in report if not check.ok]
    assert failed.name == "the original runs on these inputs" and "--input" in failed.detail


def test_outputs_and_gradients_that_are_nan_in_the_original_are_told() -> None:
    report = verified(
        nn.Sequential(nn.Linear(4, 4), Does(lambda _, x: (x - 100).sqrt()), nn.Linear(4, 2, bias=False))
    )
    assert "NaN: the original computes them too" in str(report.raise_if_failed())
    assert report.checks[-1].detail == "not checked: the original's own gradients are NaN or infinite"


def test_a_fault_is_found_although_some_gradients_are_nan() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(x)
            return self.b(x), self.c((x.detach() - 100).log())

    two = Two()
    train_model = fxcollab.transform(two, splits=["a"], seed=0)
    report = fxcollab.verify(two, train_model, (X,)).raise_if_failed()
    assert "for which the original's own are NaN" in report.checks[-1].detail
    for node in train_model.graph.nodes:
        if node.target is fxcollab.rescale:
            node.args = (node.args[0], 1.0)
    train_model.recompile()
    assert failed(fxcollab.verify(two, train_model, (X,))) == [GRADIENTS]


# ---------------------------------------------------------------------------------------------- kinds of models


class OneWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return self.c(torch.cond(x.sum() > 0, lambda t: self.b(t), lambda t: self.b(t) * 2, (x,)))


class Nested(OneWay):
    def forward(self, x: Tensor) -> Any:
        def inner(t: Tensor) -> Any:
            return torch.cond(t.max() > 1, lambda u: self.b(u).tanh(), lambda u: u - 1, (t,))

        x = self.a(x)
        return self.c(torch.cond(x.sum() > 0, inner, lambda t: self.b(t), (x,)))


class TwoValues(OneWay):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        y, z = torch.cond(x.mean() > 0, lambda t: (self.b(t), t * 2), lambda t: (t + 1, self.b(t)), (x,))
        return self.c(y * z)


@pytest.mark.parametrize("net", slow_but([OneWay], [OneWay, Nested, TwoValues]))
def test_branches_of_an_exported_model_are_followed(net: type[nn.Module]) -> None:
    model = torch.export.export(net(), (X,)).module()
    train_model = fxcollab.transform(model, splits=["linear"], init="copy-anyway", example_inputs=(X,))
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


class OnlyABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, 4), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return x @ self.table


@pytest.mark.parametrize(
    "make", [lambda: Does(lambda module, x: torch.relu(x + 3.0)), OnlyABuffer, lambda: nn.Sequential(nn.Dropout())]
)
def test_a_model_without_parameters_has_no_heads_to_prove(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(fxcollab.SplitError, match="Several instances have no effect"):
        fxcollab.transform(make(), pattern="multi-instance", heads=3)


@pytest.mark.parametrize("layer", [nn.Tanh, lambda: nn.BatchNorm1d(4), lambda: nn.Sequential(nn.Linear(4, 4))])
def test_a_model_on_meta_is_proved_but_for_its_values(layer: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = around(layer())
    report = verified(model, (X.to("meta"),), example_inputs=(X.to("meta"),))
    assert report and len(report.not_checked) == 3
    assert all("no values" in check.detail for check in report.not_checked)
    assert "graph of head 1 equals the original's" in [check.name for check in report if check.checked]


# ---------------------------------------------------------------------------------------------- frozen, or written


class Divides(nn.Module):
    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 2), norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) / self.norm(self.a.weight)


@pytest.mark.parametrize("norm", [torch.norm, torch.max, lambda weight: weight.detach().mean()])
def test_a_constant_that_was_computed_from_weights_is_found_after_a_few_steps(
    norm: Callable[[Tensor], Tensor],
) -> None:
    model = Divides(norm)
    train_model = fxcollab.transform(model, splits=["a"], seed=0)
    freeze(train_model, norm(model.a.weight).detach())
    names = failed(fxcollab.verify(model, train_model, (X,)))
    assert "after 3 training steps every head in eval mode equals an original with its weights" in names
    assert "head 0 in eval mode equals the original" not in names


def freeze(train_model: CollabGraphModule, value: Tensor) -> None:
    train_model.register_buffer("frozen", value, persistent=False)  # the registry is the original's
    for node in list(train_model.graph.nodes):
        if "truediv" in node.name:
            with train_model.graph.inserting_before(node):
                constant = train_model.graph.get_attr("frozen")
            constant.meta = dict(node.meta)
            node.args = (node.args[0], constant)
    train_model.recompile()


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True), nn.Threshold(0.0, 0.0, True)])
def test_a_write_that_another_branch_reads_is_named_even_where_values_agree(layer: nn.Module) -> None:
    model = around(layer)
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    for node in [node for node in train_model.graph.nodes if node.target is fxcollab.private_copy]:
        node.replace_all_uses_with(node.args[0])
        train_model.graph.erase_node(node)
    train_model.recompile()
    report = fxcollab.verify(model, train_model, (X,))
    [check] = [check for check in report if check.name.startswith("no branch writes") and "eval" in check.name]
    assert not check.ok and "writes into" in check.detail
