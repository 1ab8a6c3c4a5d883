"""Gradients of models that run in float32 alone: rounding passes the proof, a wrong factor does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import CollabGraphModule, Report
from tests.speeds import slow_but

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
GRADIENTS = "gradients are the mean over separate originals"
OWN, DOUBLE = "in the model's own precision", "in float64"


class CastsToSingle(nn.Module):
    """Weights of float64 and values of float32 don't go together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


class OverflowsFromDouble(CastsToSingle):
    """The lowest number of float64 is minus infinity in float32, and a softmax over nothing else is no number."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones_like(x) * torch.finfo(x.dtype).min
        scores = self.layer(x).float() + hidden.float()
        return torch.softmax(scores, -1).type_as(x) * self.layer(x)


class InsistsOnSingle(CastsToSingle):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 alone")
        return self.layer(x)


class SingleKernel(torch.autograd.Function):
    """As kernels are that were written for one type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise NotImplementedError(f"no kernel for {x.dtype}")
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (1 - x.tanh() ** 2)


class CallsAKernel(CastsToSingle):
    def forward(self, x: Tensor) -> Tensor:
        return SingleKernel.apply(self.layer(x))


class AsksForTheInputsGradient(CastsToSingle):
    """Takes no input that was computed from one that requires a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad = True
        return self.layer(x)


class Net(nn.Module):
    """A stem, a split behind it, two levels of heads; a faint value of the trunk skips into the heads."""

    def __init__(self, first: nn.Module | None = None, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.stem = first or nn.Linear(8, 8), nn.Linear(8, 8)
        self.middle, self.head = middle or nn.Linear(8, 8), nn.Linear(8, 4)
        self.faint = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        side = h.detach() * self.faint
        return self.head(self.middle(self.stem(h)).tanh() + 5e-3 * side)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "casts in the heads": (lambda: Net(middle=CastsToSingle()), OWN),
    "casts in the trunk": (lambda: Net(first=CastsToSingle()), OWN),
    "no numbers in float64": (lambda: Net(middle=OverflowsFromDouble()), OWN),
    "insists": (lambda: Net(first=InsistsOnSingle()), OWN),
    "a kernel": (lambda: Net(middle=CallsAKernel()), OWN),
    "inputs without gradient": (lambda: Net(first=AsksForTheInputsGradient()), DOUBLE),
    "any": (Net, DOUBLE),
}


@pytest.fixture(params=slow_but(["casts in the heads", "a kernel", "inputs without gradient"], MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    make, where = MODELS[request.param]
    return make(), where


def transformed(model: nn.Module, **options: Any) -> CollabGraphModule:
    options = {"pattern": "simple", "splits": ["stem"], **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "limitation|no module initialises")
        return fxcollab.transform(model, example_inputs=(X,), seed=0, **options)


def verified(model: nn.Module, train_model: CollabGraphModule) -> Report:
    return fxcollab.verify(model, train_model, (X.clone(),))


def rescales(train_model: CollabGraphModule) -> list[fx.Node]:
    return [node for node in train_model.graph.nodes if node.target is fxcollab.rescale]


def of_the_side(train_model: CollabGraphModule) -> fx.Node:
    """The rescale behind which nothing but the faint parameter lies."""
    [node] = [node for node in rescales(train_model) if "mul" in node.args[0].name]  # type: ignore[union-attr]
    return node


def scale(train_model: CollabGraphModule, node: fx.Node, factor: float) -> None:
    node.args = (node.args[0], node.args[1] * factor)  # type: ignore[operator]
    train_model.recompile()


def drop(train_model: CollabGraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    train_model.graph.erase_node(node)
    train_model.recompile()


Edit = Callable[[CollabGraphModule, fx.Node], None]
EDITS: dict[str, Edit] = {
    "1% more": lambda train_model, node: scale(train_model, node, 1.01),
    "0.05% more": lambda train_model, node: scale(train_model, node, 1.0005),
    "1% less": lambda train_model, node: scale(train_model, node, 0.99),
    "twice": lambda train_model, node: scale(train_model, node, 2.0),
    "no number": lambda train_model, node: scale(train_model, node, float("nan")),
    "none": drop,
}


def assert_only_gradients_fail(report: Report, where: str, tensor: str) -> None:
    [failed] = [check for check in report if not check.ok]
    assert failed.name == GRADIENTS
    assert where in failed.detail and failed.detail.rpartition(" at ")[2].startswith(tensor)


# ----------------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize(
    "options",
    slow_but(
        ["2 heads"],
        [
            pytest.param({}, id="2 heads"),
            pytest.param({"heads": 3}, id="3 heads"),
            pytest.param({"pattern": "hierarchical", "splits": ["first", "stem"], "fanouts": (3, 2)}, id="tree of 6"),
        ],
    ),
)
def test_a_model_that_runs_in_single_precision_alone_is_proved(
    case: tuple[nn.Module, str], options: dict[str, Any]
) -> None:
    model, where = case
    report = verified(model, transformed(model, **options)).raise_if_failed()
    assert report.checks[-1].name == GRADIENTS and where in report.checks[-1].detail


def test_where_inputs_take_no_gradient_the_parameters_are_compared_in_double_precision() -> None:
    for first, inputs in ((AsksForTheInputsGradient(), 0), (nn.Linear(8, 8), 1)):
        model = Net(first=first)
        train_model = transformed(model)
        count = len(list(train_model.parameters())) + inputs
        assert verified(model, train_model).checks[-1].detail.startswith(f"{count} tensors in float64")


class Cancels(nn.Module):
    """In float32 alone; the bias before the BatchNorm gets a gradient of rounding and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.stem = CastsToSingle(), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.inner, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(self.norm(self.first(x) * 100).relu())))


@pytest.mark.parametrize("seed", slow_but([0], range(4)))
@pytest.mark.parametrize("heads", [2, 3])
def test_a_gradient_that_is_all_rounding_passes_and_a_wrong_factor_beside_it_doesnt(seed: int, heads: int) -> None:
    torch.manual_seed(seed)
    model = Cancels()
    train_model = transformed(model, splits=["stem"], heads=heads)
    assert OWN in verified(model, train_model).raise_if_failed().checks[-1].detail
    scale(train_model, rescales(train_model)[0], 1.01)
    assert_only_gradients_fail(verified(model, train_model), OWN, "")


class Steep(nn.Module):
    """Rounding grows from layer to layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stem, self.head = CastsToSingle(), nn.Linear(8, 8), nn.Linear(8, 4)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
        for layer in (self.stem, *self.layers.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(self.first(x))))


@pytest.mark.parametrize("seed", slow_but([0], range(4)))
def test_where_rounding_grows_a_wrong_factor_is_found_all_the_same(seed: int) -> None:
    torch.manual_seed(seed)
    model = Steep()
    train_model = transformed(model, heads=3)
    assert OWN in verified(model, train_model).raise_if_failed().checks[-1].detail
    scale(train_model, rescales(train_model)[0], 0.99)
    assert_only_gradients_fail(verified(model, train_model), OWN, "")


# --------------------------------------------------------------------------------------------- what doesn't


@pytest.mark.parametrize("edit", slow_but(["1% more"], EDITS))
def test_a_wrong_factor_of_the_split_is_found(case: tuple[nn.Module, str], edit: str) -> None:
    model, where = case
    train_model = transformed(model)
    [main] = [node for node in rescales(train_model) if node is not of_the_side(train_model)]
    EDITS[edit](train_model, main)
    assert_only_gradients_fail(verified(model, train_model), where, "")


def share_of_the_faint_gradient(model: Net) -> float:
    (model(X.clone()) * torch.randn(5, 4)).sum().backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return sizes["faint"] / max(sizes.values())


@pytest.mark.parametrize("edit", slow_but(["none"], EDITS))
def test_a_wrong_factor_is_found_on_a_gradient_that_is_a_thousandth_of_the_largest(
    case: tuple[nn.Module, str], edit: str
) -> None:
    model, where = case
    assert isinstance(model, Net)
    assert 4e-4 < share_of_the_faint_gradient(model) < 2e-3
    train_model = transformed(model)
    verified(model, train_model).raise_if_failed()
    EDITS[edit](train_model, of_the_side(train_model))
    assert_only_gradients_fail(verified(model, train_model), where, "faint")


@pytest.mark.parametrize("index", slow_but([0], range(4)))
@pytest.mark.parametrize("edit", slow_but(["1% more"], ["1% more", "none"]))
def test_a_wrong_factor_anywhere_in_a_tree_is_found(edit: str, index: int) -> None:
    model = Net(first=CastsToSingle())
    train_model = transformed(model, pattern="hierarchical", splits=["first", "stem"], fanouts=(2, 3))
    assert OWN in verified(model, train_model).raise_if_failed().checks[-1].detail
    EDITS[edit](train_model, rescales(train_model)[index])
    assert_only_gradients_fail(verified(model, train_model), OWN, "")


# ------------------------------------------------------------------------------------ lower precision inside


class PassesThrough(Net):
    """What gradients flow through is of low precision at one point."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        side = h.detach() * self.faint
        return self.head(self.middle(self.stem(h).to(self.dtype).to(x.dtype)).tanh() + 5e-3 * side)


class Masks(PassesThrough):
    """A mask alone is of low precision: zeros and ones, through which no gradient flows."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, :4] > 0).to(self.dtype)
        return Net.forward(self, x) * mask.to(x.dtype)


@pytest.mark.parametrize(
    "dtype", slow_but([torch.bfloat16], [torch.float16, torch.bfloat16]), ids=["half", "bfloat16"]
)
@pytest.mark.parametrize("make", [PassesThrough, Masks])
def test_a_dropped_factor_is_found_where_precision_is_low(make: type[PassesThrough], dtype: torch.dtype) -> None:
    model = make(dtype)
    train_model = transformed(model)
    verified(model, train_model).raise_if_failed()
    drop(train_model, of_the_side(train_model))
    assert_only_gradients_fail(verified(model, train_model), DOUBLE, "faint")


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float16, 1.01), pytest.param(torch.bfloat16, 1.1, marks=pytest.mark.slow)],
    ids=["half", "bfloat16"],
)
def test_a_mask_of_low_precision_hides_no_wrong_factor(dtype: torch.dtype, factor: float) -> None:
    model = Masks(dtype)
    train_model = transformed(model)
    for node in rescales(train_model):
        scale(train_model, node, factor)
    assert not verified(model, train_model)
