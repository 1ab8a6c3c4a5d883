"""What a forward computes from the model's state outside of attributes follows the weights, in every head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CollabGraphModule
from tests.speeds import slow_but

X = torch.linspace(-1, 1, 12, dtype=torch.double).reshape(3, 4)


class Reads(nn.Module):
    """``first``, ``second`` and ``last``; ``extra`` is what a reader makes of the state."""

    reader: Callable[[Any, Tensor], Any]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("table", torch.rand(4))

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(x), type(self).reader(self, x)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def reads(reader: Callable[[Any, Tensor], Any], seed: int = 0) -> Reads:
    torch.manual_seed(seed)
    cls = type("Reads", (Reads,), {"reader": staticmethod(reader)})
    return cls().double()


READERS: dict[str, Callable[[Any, Tensor], Any]] = {}


def reader(function: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    READERS[function.__name__] = function
    return function


@reader
def sum_of_squares(model: Any, x: Tensor) -> Any:
    return sum(p.pow(2).sum() for p in model.parameters())


@reader
def norms_that_are_detached(model: Any, x: Tensor) -> Any:
    return x / sum(p.detach().norm() for p in model.second.parameters())


@reader
def norms_under_no_grad(model: Any, x: Tensor) -> Any:
    with torch.no_grad():
        norm = torch.stack([p.norm() for p in model.second.parameters()]).norm()
    return x / norm


@reader
def named_parameters(model: Any, x: Tensor) -> Any:
    return sum(p.abs().sum() for name, p in model.named_parameters() if name.endswith("weight"))


@reader
def an_entry_of_the_state_dict(model: Any, x: Tensor) -> Any:
    return x @ model.state_dict()["second.weight"]


@reader
def entries_of_a_state_dict_with_gradients(model: Any, x: Tensor) -> Any:
    state = model.state_dict(keep_vars=True)
    return x @ state["second.weight"] + state["first.bias"]


@reader
def an_entry_of_the_registry(model: Any, x: Tensor) -> Any:
    return x * model.second._parameters["bias"] + model._buffers["table"]


@reader
def data(model: Any, x: Tensor) -> Any:
    return x @ next(model.second.parameters()).data + model.second.bias.data


@reader
def a_list_of_parameters(model: Any, x: Tensor) -> Any:
    weights = list(model.parameters())
    return x @ weights[0] @ weights[2] + weights[-1].sum()


@reader
def stacked(model: Any, x: Tensor) -> Any:
    return torch.stack([p.sum() for p in model.parameters()]), torch.stack(list(model.second.parameters())[1:])


@reader
def concatenated(model: Any, x: Tensor) -> Any:
    return torch.cat([p.flatten() for p in model.parameters()]).std()


@reader
def vector_of_parameters(model: Any, x: Tensor) -> Any:
    return nn.utils.parameters_to_vector(model.second.parameters()).norm()


@reader
def arithmetic_with_numbers(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    return 1 - weight, weight - 1, 2 / (3 + bias), bias**2, 2**bias, -bias, abs(bias), bias % 1.5


@reader
def arithmetic_with_each_other(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    return weight @ bias, bias @ weight, weight + bias, bias - weight, weight * bias > 0, weight.T @ weight


@reader
def arithmetic_with_values(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    return x @ weight, x + bias, bias - x, bias * x, (x.abs() + 1) ** bias, torch.where(x > bias, x, bias)


@reader
def indexed(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    return weight[0], weight[:, 1:3], weight[-1, 0] * x, bias[None], weight[bias > 0].sum(), weight[..., 0]


@reader
def unpacked(model: Any, x: Tensor) -> Any:
    one, *others = next(model.second.parameters())
    return one + sum(others), [row.sum() for row in model.second.weight]


@reader
def named_buffers(model: Any, x: Tensor) -> Any:
    return x * dict(model.named_buffers())["table"] + sum(b.sum() for b in model.buffers())


@reader
def type_of_the_model(model: Any, x: Tensor) -> Any:
    return x.to(model.dtype), torch.zeros(4, device=model.device, dtype=model.dtype) + x


@reader
def shapes(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    assert type(weight.shape[0]) is int and type(weight.numel()) is int and type(len(bias)) is int
    assert weight.size() == (4, 4) and weight.dim() == bias.ndim + 1 and bias.size(0) == len(weight)
    return x.reshape(-1, weight.shape[0]) / bias.numel() + torch.ones(len(bias)) * x.new_ones(weight.shape)[0]


@reader
def functions_of_torch(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    return (
        torch.nn.functional.linear(x, weight, bias),
        torch.einsum("ij,kj->ik", x, weight),
        torch.linalg.vector_norm(weight, dim=1),
        torch.addmm(bias, x, weight),
    )


@reader
def copies_that_are_changed(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    changed, scaled = weight.clone(), bias * 2
    changed[0] = 0
    changed[:, 1] += 1
    scaled *= x.detach()[0]
    scaled.add_(1)
    return changed, scaled, torch.zeros_like(weight).copy_(weight), torch.empty(4, dtype=x.dtype).copy_(bias)


@reader
def tensors_like_it(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    return (
        torch.ones_like(weight) * x[0],
        weight.new_full((4,), 2.0),
        torch.as_tensor(bias),
        bias.to(x),
        x.type_as(bias),
    )


@reader
def pairs_of_parameters(model: Any, x: Tensor) -> Any:
    pairs = zip(model.first.parameters(), model.second.parameters(), strict=True)
    return sum(((one - other) ** 2).mean() for one, other in pairs)


@reader
def sorted_parameters(model: Any, x: Tensor) -> Any:
    by_size = sorted(model.second.parameters(), key=lambda p: p.numel())
    return by_size[0] + x, max(model.second.parameters(), key=len)[1], next(p for p in by_size if p.ndim == 1)


@reader
def another_call_with_parameters(model: Any, x: Tensor) -> Any:
    return nn.functional.linear(x, *model.second.parameters())


@reader
def questions_of_the_class(model: Any, x: Tensor) -> Any:
    trained = [p for p in model.second.parameters() if isinstance(p, nn.Parameter) and p.requires_grad]
    return sum(p.sum() for p in trained if p.is_floating_point()) * len(trained)


@reader
def transposed(model: Any, x: Tensor) -> Any:
    weight, bias = model.second.parameters()
    return weight.T + weight.mT, x @ weight.t(), bias.unsqueeze(0).expand_as(x), weight.view(-1)[:4], bias.detach()


@reader
def of_every_module(model: Any, x: Tensor) -> Any:
    return sum(m.weight.norm() for m in model.modules() if isinstance(m, nn.Linear)), model.get_parameter(
        "second.bias"
    )


def outputs(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from outputs(part)


def follows(model: Reads, splits: list[str], x: Tensor = X) -> CollabGraphModule:
    """The training model, of which every head equals an original with its weights, also after three steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no module initialises")
        train_model = fxcollab.transform(model, splits=splits, seed=1)
    optimizer = torch.optim.SGD(train_model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        found = [o for o in outputs(train_model(x)) if o.requires_grad]
        torch.stack([o.square().mean() for o in found]).sum().backward()
        optimizer.step()
    for head, output in enumerate(train_model(x)):
        original = reads(type(model).reader, seed=5)
        original.load_state_dict(fxcollab.prune_state_dict(train_model.state_dict(), head))
        for one, other in zip(outputs(output), outputs(original(x)), strict=True):
            assert torch.equal(one, other)
    fxcollab.verify(model, train_model, (x,)).raise_if_failed()
    return train_model


@pytest.mark.parametrize("split", slow_but(["first"], ["first", "second"]))
@pytest.mark.parametrize("function", READERS.values(), ids=READERS.keys())
def test_what_is_computed_from_state_follows_it(function: Callable[[Any, Tensor], Any], split: str) -> None:
    model = reads(function)
    train_model = follows(model, [split])
    assert train_model.constants == ()


# ------------------------------------------------------------------------------------ types and devices


def converts(model: Any, x: Tensor) -> Any:
    return x.to(model.device).to(model.dtype)


def makes_zeros(model: Any, x: Tensor) -> Any:
    weight = next(model.parameters())
    return torch.zeros(4, device=weight.device, dtype=weight.dtype) + torch.ones((), dtype=model.dtype)


def asks_a_parameter(model: Any, x: Tensor) -> Any:
    return torch.arange(4, device=model.first.weight.device).to(dtype=model.second.bias.dtype), x.to(
        model.table.dtype
    )


def compares(model: Any, x: Tensor) -> Any:
    return x.to(model.dtype) if x.dtype != model.dtype else x


@pytest.mark.parametrize("function", [converts, makes_zeros, asks_a_parameter, compares])
def test_types_and_devices_are_those_that_the_model_has_when_it_is_called(function: Any) -> None:
    class Converts(Reads):
        def forward(self, x: Tensor) -> Any:
            x = x.to(self.device).to(self.dtype)
            return self.last(self.second(self.first(x))), function(self, x)

    model = Converts().double()
    train_model = fxcollab.transform(model, splits=["first"], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    for change in (nn.Module.bfloat16, nn.Module.double, lambda module: module.to("meta")):
        change(train_model)
        for found in train_model(X):
            for one, other in zip(outputs(found), outputs(model(X)), strict=True):
                assert (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
                assert one.is_meta or function is not makes_zeros or torch.equal(one, other) or one.ndim == 2


def test_the_type_in_a_question_is_asked_again() -> None:
    def question(model: Any, x: Tensor) -> Any:
        return x * 2 if model.dtype == torch.double else x

    train_model = fxcollab.transform(reads(question), splits=["first"], seed=0)
    assert torch.equal(train_model(X)[0][1], reads(question)(X)[1])
    train_model.float()
    with pytest.raises(fxcollab.CaptureError):
        train_model(X.float())


# -------------------------------------------------------------------------------------------- in passing


def test_what_is_read_in_passing_leaves_no_nodes() -> None:
    def passing(model: Any, x: Tensor) -> Any:
        state, _ = model.state_dict(), [p.detach() for p in model.parameters()]
        assert len(list(model.named_parameters())) == len(state) - 1
        return x + state["table"] + sum(p.shape[0] for p in model.parameters())

    def nothing(model: Any, x: Tensor) -> Any:
        return x + model.table.detach() + 19

    found, expected = (fxcollab.capture(reads(function), ["first"]).graph for function in (passing, nothing))
    assert [str(node.target) for node in found.nodes] == [str(node.target) for node in expected.nodes]
    unused = [node for node in found.nodes if not node.users and node.op not in ("placeholder", "output")]
    assert unused == []


# -------------------------------------------------------------------------- features that hooks put aside


class Hooked(nn.Module):
    """``head`` takes what hooks have put into ``features``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6))
        self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.features: dict[str, Tensor] = {}
        self.body[0].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features["0"] = output

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(torch.relu(self.middle(self.features["0"])))


class HookedList(Hooked):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.body[2].register_forward_hook(lambda module, inputs, output: self.kept.append(output))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        self.body(x)
        return self.head(torch.relu(self.middle(self.kept[-1])))


class HookedAttribute(Hooked):
    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        module.last = output

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(torch.relu(self.middle(self.body[0].last)))


HOOKED = [Hooked, HookedList, HookedAttribute]


COLLECTED: list[Tensor] = []


class Collects(nn.Linear):
    """Leaves what it computes where the forward finds it, in a global."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        COLLECTED.append(x)
        return x


class AsksForData(nn.Module):
    """What ``body`` leaves is read after a question that only real values answer."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.body, self.middle, self.head = Collects(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        COLLECTED.clear()
        y = self.middle(self.body(x))
        return self.head(y + self.read(self) if (y > -1e9).all() else y)


@pytest.mark.parametrize(
    "read",
    [
        lambda model: COLLECTED[-1],
        lambda model: COLLECTED[-1].detach().tanh(),
        lambda model: torch.stack([each[:, :1] for each in COLLECTED]).sum(0),
        lambda model: COLLECTED.pop().clone().mul_(2),
    ],
    ids=["itself", "computed", "stacked", "written"],
)
def test_what_a_module_leaves_while_an_example_is_computed_is_no_constant(read: Any) -> None:
    model = AsksForData(read).double()
    with pytest.raises(fxcollab.CaptureError) as caught:
        fxcollab.transform(model, splits=["middle"], example_inputs=(X,))
    assert "a leaf module" in str(caught.value.why) and "would be a constant" in str(caught.value.why)


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("cls", HOOKED)
@pytest.mark.parametrize("split", slow_but(["middle"], ["middle", "body.0"]))
def test_features_that_hooks_of_modules_kept_whole_put_aside_are_refused(cls: Any, called: bool, split: str) -> None:
    model = cls().double()
    if called:
        model(X)
    with pytest.raises(fxcollab.CaptureError) as caught:
        fxcollab.transform(model, splits=[split])
    error = caught.value
    if called and cls is not HookedList:  # which empties its list first
        assert error.what.startswith("The graph would read what an earlier call left in ")
        assert "kept whole changes" in str(error.why) and "splits outside of it" in str(error.hint)
    else:
        assert "hooks of body.0" in str(error.why) and "don't run while the forward is traced" in str(error.why)
        assert "into a module of its own" in str(error.hint)


@pytest.mark.parametrize("cls", HOOKED)
@pytest.mark.parametrize("split", slow_but(["0"], ["0", "1"]))
def test_features_that_hooks_put_aside_are_each_heads_own_where_the_module_around_is_kept_whole(
    cls: Any, split: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), cls(), nn.Linear(3, 3)).double()
    train_model = fxcollab.transform(model, splits=[split], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_functions_that_a_module_holds_reach_each_heads_own_state() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.function = lambda x: self.inner(x)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.function(x))

    model = nn.Sequential(nn.Linear(4, 4), Holds(), nn.Linear(4, 3)).double()
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_hooks_fill_a_list_of_the_callers_in_every_head() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)), []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(module))
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    assert seen == []
    train_model(X.float())
    assert seen == [model[1], train_model.get_submodule("peers.b1.1")]


class Stages(nn.Module):
    """Hands on what hooks collect of its layers, as transformers does for ``output_hidden_states``."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        hooks = [
            each[0].register_forward_hook(lambda module, inputs, output: found.append(output)) for each in self.layers
        ]
        for layer in self.layers:
            x = layer(x)
        for hook in hooks:
            hook.remove()
        return [*found, x]


class TakesAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages, self.head = Stages(), Weighs()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x))


class Weighs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(4, 2) for _ in range(4))

    def forward(self, values: list[Tensor]) -> Tensor:
        return torch.stack([self.weights[number](values[number]) for number in range(4)]).sum(0)


def test_a_graph_that_fails_where_the_model_works_is_refused() -> None:
    model = TakesAll().double()
    with pytest.raises(
        fxcollab.CaptureError, match="fails on the example inputs, on which the model works"
    ) as caught:
        fxcollab.transform(model, splits=["stages.layers.1"], example_inputs=(X,))
    assert "head" in str(caught.value.where) and "IndexError" in str(caught.value.why)
    assert "'stages'" in str(caught.value.hint)
    train_model = fxcollab.transform(model, splits=["stages"], example_inputs=(X,))
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    with pytest.warns(UserWarning, match="splits inside of modules are not searched"):
        assert fxcollab.choose_splits(model, (X,), fanouts=(2,)).splits == ("stages",)
