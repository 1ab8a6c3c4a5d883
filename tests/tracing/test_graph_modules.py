"""Graphs that were traced or exported before are taken as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.fx_utils import describe_node
from tests.speeds import slow_but
from tests.tracing.capture_helpers import AuxNet, Block, Net, X, follows_the_mode


@pytest.fixture
def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Net())


def test_a_traced_graph_is_taken_as_it_is(traced: fx.GraphModule) -> None:
    before = list(map(describe_node, traced.graph.nodes))
    captured = fxcollab.capture(traced)
    assert list(map(describe_node, captured.graph.nodes)) == before
    assert captured.code == traced.code
    assert captured.graph is not traced.graph


def test_a_captured_module_is_taken_as_it_is() -> None:
    captured = fxcollab.capture(AuxNet(), ["stem"])
    again = fxcollab.capture(captured)
    assert again.code == captured.code
    assert follows_the_mode(again, captured)


@pytest.mark.parametrize(
    "splits", [["stem"], ["body.0"], ["body.0.act", "body.1.second"], ["add"], ["body_0_first", "add_1"]]
)
@pytest.mark.parametrize("fanouts", slow_but([3], [None, 3]))
def test_a_traced_graph_is_pruned_back_node_for_node(
    traced: fx.GraphModule, splits: list[str], fanouts: int | None
) -> None:
    before, code = list(map(describe_node, traced.graph.nodes)), traced.code
    train_model = fxcollab.transform(traced, splits=splits, fanouts=fanouts and (fanouts,) * len(splits))
    for head in range(len(train_model(X))):
        pruned = fxcollab.prune(train_model, head)
        assert list(map(describe_node, pruned.graph.nodes)) == before
        assert pruned.code == code
    assert list(map(describe_node, traced.graph.nodes)) == before
    fxcollab.verify(traced, train_model, (X,)).raise_if_failed()


def test_a_module_path_in_a_traced_graph_is_the_value_it_returns(traced: fx.GraphModule) -> None:
    by_path = fxcollab.transform(traced, splits=["body.0"], seed=0)
    by_node = fxcollab.transform(traced, splits=["add"], seed=0)
    assert by_path.code == by_node.code


@pytest.mark.parametrize("make", [Net, AuxNet, Block])
def test_retracing_the_pruned_graph_gives_what_tracing_the_model_gives(make: Callable[[], nn.Module]) -> None:
    model = make()
    splits = {Net: ["body.0"], AuxNet: ["stem"], Block: ["first"]}[make]
    expected = fx.symbolic_trace(model).code
    assert fx.symbolic_trace(fxcollab.prune(fxcollab.transform(model, splits=splits))).code == expected
    model.eval()
    expected = fx.symbolic_trace(model).code
    assert fx.symbolic_trace(fxcollab.prune(fxcollab.transform(model, splits=splits))).code == expected


def test_inplace_operators_retrace_as_plain_fx_traces_them() -> None:
    class Plus(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x += 1
            return self.head(self.body(x))

    model = Plus()
    pruned = fxcollab.prune(fxcollab.transform(model, splits=["stem"]))
    assert fx.symbolic_trace(pruned).code == fx.symbolic_trace(model).code


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.norm = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4)
        self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.body(self.norm(self.act(self.stem(x))))), "in": x}


@pytest.fixture(params=["as exported", "able to train()"])
def exported(request: pytest.FixtureRequest) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Exported().train(), (X,), dynamic_shapes=({0: batch},))
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


@pytest.mark.parametrize(
    "splits", slow_but([["stem"], ["linear", "batch_norm"]], [["stem"], ["act", "body.0"], ["linear", "batch_norm"]])
)
def test_an_exported_graph_is_pruned_back_node_for_node(exported: fx.GraphModule, splits: list[str]) -> None:
    before, code = list(map(describe_node, exported.graph.nodes)), exported.code
    train_model = fxcollab.transform(exported, splits=splits, init="copy-anyway")
    pruned = fxcollab.prune(train_model)
    assert list(map(describe_node, pruned.graph.nodes)) == before
    assert pruned.code == code
    for head in train_model(X):
        assert list(head) == ["out", "in"]
    fxcollab.verify(exported, train_model, (X,)).raise_if_failed()


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.stem(x)))
        found: Tensor = self.fc(x * 2 if self.training else x)
        return found


class Swapping(fx.GraphModule):
    """Has a graph for each mode, replaced by ``train()``."""

    def __init__(self, model: nn.Module) -> None:
        graphs = {mode: fx.Tracer().trace(model.train(mode)) for mode in (False, True)}
        super().__init__(model, graphs[True])
        self.graphs = graphs

    def train(self, mode: bool = True) -> Swapping:
        super().train(mode)
        self.graph = self.graphs[mode]
        return self


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_module_that_replaces_its_graph_by_mode_is_taken_in_both(training: bool) -> None:
    model, x = Swapping(ByMode()).train(training), torch.randn(2, 4)
    before = model.code
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    fxcollab.verify(model, train_model, (x,)).raise_if_failed()
    assert (model.code, model.training, model.stem.training) == (before, training, training)
    pruned = fxcollab.prune(train_model)
    for mode in (True, False):
        expected = model.train(mode)(x)
        assert torch.equal(fxcollab.all_heads(train_model.train(mode))(x)[0], expected) and torch.equal(
            pruned.train(mode)(x), expected
        )


def test_a_feature_extractor_of_torchvision_is_taken() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = extraction.create_feature_extractor(Net(), {"body": "features"})
    train_model = fxcollab.transform(model, splits=["body.0"], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert [list(output) for output in train_model(X)] == [["features"]] * 2


class WithGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(4, 6), nn.Linear(6, 3)
        self.body = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.body(self.stem(x)))
        return found


@pytest.mark.parametrize("split", ["stem", "body", "body.0"])
def test_a_graph_module_inside_a_model_is_a_module_like_others(split: str) -> None:
    model, x = WithGraph(), torch.randn(3, 4)
    train_model = fxcollab.transform(model, splits=[split], seed=0)
    fxcollab.verify(model, train_model, (x,)).raise_if_failed()
    assert ("self.body(" in train_model.code) == (split != "body.0")


class OwnCall(fx.GraphModule):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


def test_a_graph_module_with_a_call_of_its_own_is_called_once() -> None:
    model, x = WithGraph(), torch.randn(3, 4)
    model.body = OwnCall(nn.Module(), fx.symbolic_trace(nn.Identity()).graph)
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    fxcollab.verify(model, train_model, (x,)).raise_if_failed()
    with pytest.raises(fxcollab.CaptureError, match="overrides __call__"):
        fxcollab.capture(model.body)


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: dict[str, Tensor], scale: Any) -> Any:
        return self.b(self.a(x["left"]) + x["right"]) * scale


def test_inputs_in_a_dict_of_an_exported_graph_are_its_placeholders() -> None:
    x = {"left": torch.randn(3, 4), "right": torch.randn(3, 4)}
    exported = torch.export.export(Structured(), (x, torch.ones(2))).module()
    train_model = fxcollab.transform(exported, splits=["linear"], example_inputs=(x, torch.ones(2)), seed=0)
    fxcollab.verify(exported, train_model, (x, torch.ones(2))).raise_if_failed()


def test_inputs_in_a_dict_of_a_traced_graph_are_its_placeholders() -> None:
    x = {"left": torch.randn(3, 4), "right": torch.randn(3, 4)}
    traced = fx.symbolic_trace(Structured(), concrete_args={"x": {"left": fx.PH, "right": fx.PH}, "scale": fx.PH})
    for scale in (torch.tensor(2.0), 2.0):
        train_model = fxcollab.transform(traced, splits=["a"], example_inputs=(x, scale), seed=0)
        fxcollab.verify(traced, train_model, (x, scale)).raise_if_failed()


def test_a_number_may_be_an_input_of_a_graph(traced: fx.GraphModule) -> None:
    class Scaled(Structured):
        def forward(self, x: Tensor, scale: float) -> Any:
            return self.b(self.a(x) * scale)

    traced = fx.symbolic_trace(Scaled())
    train_model = fxcollab.transform(traced, splits=["a"], example_inputs=(torch.randn(3, 4), 2.5), seed=0)
    fxcollab.verify(traced, train_model, (torch.randn(3, 4), 1.5)).raise_if_failed()


class Printed(fx.graph.CodeGen):
    """A code generation of a user's own."""


def test_a_graph_with_code_generation_of_its_own_is_refused(traced: fx.GraphModule) -> None:
    traced.graph.set_codegen(Printed())
    with pytest.raises(fxcollab.CaptureError, match="generates its code with Printed"):
        fxcollab.capture(traced)


def test_nan_among_the_arguments_of_a_node_equals_itself() -> None:
    class Fills(Structured):
        def forward(self, x: Tensor) -> Any:
            return self.b(self.a(x).clamp(min=float("nan")).nan_to_num(0.5))

    model = Fills()
    train_model = fxcollab.transform(model, splits=["a"], seed=0)
    fxcollab.verify(model, train_model, (torch.randn(3, 4),)).raise_if_failed()
