"""What nodes do is observed: writes, shared storage, modules that are handed on, random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._higher_order_ops import associative_scan, while_loop

import fxcollab
from fxcollab import CollabGraphModule, PatternError
from fxcollab._torch import FakeTensor
from fxcollab.analysis.observe import observe
from tests.rewriting.hazard_helpers import SEQUENCE, Stem, X, copies, proven
from tests.speeds import slow_but

# --------------------------------------------------------------------------------------- writes in place


class WritingEncoder(nn.TransformerEncoderLayer):
    """A residual in place, inside one of torch's own containers."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        src += self.linear2(torch.relu(self.linear1(src)))
        return self.norm1(src)


def encoder(layer: type[nn.TransformerEncoderLayer]) -> nn.Module:
    return nn.TransformerEncoder(layer(4, 1, 8, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False)


class WritingList(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x.add_(layer(x.detach()))
        return x


class WritingSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class WritingLinear(nn.Linear):
    """Named like one of torch's, and writes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp_(min=0))


class UnderAHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.register_forward_hook(lambda module, inputs, output: output.mul_(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


class InAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for row in x.detach().unbind(0):
            row[1:].neg_()
        return x * 2


class InAChunk(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, _ = x.detach().chunk(2, dim=-1)
        one.transpose(0, 1).add_(1)
        return x * 2


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class DoublesInSecret(torch.autograd.Function):
    """Writes without saying so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class InAnAutogradFunction(nn.Module):
    function: Any = Doubles

    def forward(self, x: Tensor) -> Tensor:
        return type(self).function.apply(x) + 1


class InASecretiveFunction(InAnAutogradFunction):
    function = DoublesInSecret


class ThroughData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        return x + 1


class IntoData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.data = x.data * 2
        return x + 1


class ByOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.add(x, 1, out=x)
        return x * 2


class ByOutOfAMethod(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.sigmoid(x.detach(), out=x.detach())
        return x * 2


class IntoAListsMember(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        held = {"x": [x]}
        torch._foreach_add_([t.detach() for t in held["x"]], 1.0)
        return x * 2


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.detach().numpy()[:] += 1
        return x * 2


class OnlySometimes(nn.Module):
    """Writes in batches of an odd size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if x.shape[0] % 2 else x * 2


class OnlyInEvalMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x.mul_(2)


WRITERS: list[Callable[[], nn.Module]] = [
    lambda: WritingList([nn.Linear(4, 4)]), lambda: WritingSequential(nn.Linear(4, 4)), lambda: WritingLinear(4, 4),
    UnderAHook, InAView, InAChunk, InAnAutogradFunction, InASecretiveFunction, ThroughData, IntoData, ByOut,
    ByOutOfAMethod, IntoAListsMember, OnlySometimes, OnlyInEvalMode,
]  # fmt: skip


def check_equal_heads(train_model: CollabGraphModule, x: Tensor) -> None:
    """Copies of a head return the same, whichever ran first."""
    for training in (True, False):
        outputs = fxcollab.all_heads(train_model.train(training))(x.clone())
        assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("behind", WRITERS, ids=[getattr(w, "__name__", "") for w in WRITERS])
def test_what_writes_into_a_value_of_the_trunk_gets_a_copy_in_each_head(behind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Stem(behind())
    train_model = fxcollab.transform(model, splits=["stem"], init="copy-anyway", example_inputs=(X,))
    assert copies(train_model) == 2
    check_equal_heads(train_model, X)
    check_equal_heads(train_model, X[:2])
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


@pytest.mark.parametrize("layer", [WritingEncoder, nn.TransformerEncoderLayer])
def test_writes_of_a_subclass_in_a_container_of_torch_are_seen(layer: Any) -> None:
    model = Stem(encoder(layer))
    train_model = proven(model, ["stem"], (SEQUENCE,))
    assert copies(train_model) == (2 if layer is WritingEncoder else 0)


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.t().reshape(-1), lambda x: x.contiguous(), lambda x: x.to(torch.float32), lambda x: x.t().flatten(),
    lambda x: x.type(torch.float32), lambda x: F.dropout(x, 0.5, training=False), lambda x: torch.as_tensor(x),
    lambda x: x.float(), lambda x: x.t().ravel(), lambda x: x.resolve_conj(), lambda x: x[:1].expand(2, 4)[0],
    lambda x: torch.broadcast_to(x, (*x.shape,)), lambda x: F.dropout(x, 0.5, x.shape[0] > 9), lambda x: x.real,
]  # fmt: skip


@pytest.mark.parametrize("view", slow_but(VIEWS[:6], VIEWS))
@pytest.mark.parametrize("rows", slow_but([1], [1, 3]))
def test_a_value_that_may_be_a_view_counts_as_one(view: Callable[[Tensor], Tensor], rows: int) -> None:
    class Views(Stem):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            view(x).detach().add_(1)
            return self.head(x)

    train_model = fxcollab.transform(Views(), splits=["stem"], init="copy-anyway", example_inputs=(X[:rows],))
    assert copies(train_model) == 2


@pytest.mark.parametrize("inputs", [(X,), (X[:2],)])
def test_a_write_for_some_sizes_of_a_batch_is_seen_whichever_is_the_example(inputs: Any) -> None:
    train_model = proven(Stem(OnlySometimes()), ["stem"], inputs)
    assert copies(train_model) == 2


# ------------------------------------------------------------------------------- modules that are handed on


@fx.wrap
def apply_module(x: Tensor, module: nn.Module) -> Tensor:
    return module(x)


@fx.wrap
def apply_all(x: Tensor, modules: Any) -> Tensor:
    for module in modules:
        x = module(x)
    return x


class Handed(nn.Module):
    """Modules go to a function, before and behind ``mix`` where ``both``."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.first, self.mix, self.norm, self.last = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 3),
        )
        self.act, self.both = nn.ReLU(inplace=True), both

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = apply_module(x, self.norm) if self.both else x
        return self.last(apply_module(self.mix(x), self.norm))


class HandedInAList(Handed):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = apply_all(x, [self.norm]) if self.both else x
        return self.last(apply_all(self.mix(x), [self.norm, self.act]))


class Applies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, module: nn.Module) -> Tensor:
        return module(self.inner(x).tanh())


class HandedToModules(Handed):
    def __init__(self, both: bool = False) -> None:
        super().__init__(both)
        self.before, self.behind = Applies(), Applies()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.before(x, self.norm) if self.both else x
        return self.last(self.behind(self.mix(x), module=self.norm))


HANDED = [Handed, HandedInAList, HandedToModules]


@pytest.mark.parametrize("cls", HANDED)
def test_a_module_that_is_handed_on_is_cloned(cls: Any) -> None:
    model = cls()
    train_model = proven(model, ["mix"])
    peer = train_model.get_submodule("peers.b1.norm")
    assert peer is not model.norm and peer.weight is not model.norm.weight
    train_model(X)
    assert model.norm.num_batches_tracked == peer.num_batches_tracked == 1


def test_modules_that_are_handed_a_module_are_opened_so_that_it_may_be_used_on_both_sides_of_a_split() -> None:
    train_model = proven(HandedToModules(both=True), ["mix"])
    assert "peers.b1.norm.weight" not in train_model.state_dict()


@pytest.mark.parametrize("cls", [cls for cls in HANDED if cls is not HandedToModules])
def test_a_module_that_is_handed_to_functions_on_both_sides_of_a_split_is_refused(cls: Any) -> None:
    with pytest.raises(
        fxcollab.SplitError, match="Module 'norm' is handed to calls before and behind a split"
    ) as error:
        fxcollab.transform(cls(both=True), splits=["mix"])
    assert "could not be rescaled" in str(error.value.why)
    proven(cls(both=True), ["first"])  # as the hint says


# ------------------------------------------------------------------------------------------ random numbers


class NoisyInNameOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.noise = nn.Dropout(0.0), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.dropout(x))


class Jitters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class RollsDice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random() if self.training else x


class Permutes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, torch.randperm(4)]


class FillsBernoulli(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(0.5)


class Attends(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=rate, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Fused(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=self.rate if self.training else 0.0)


class Recurrent(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=rate, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize(
    ("behind", "draws"),
    [
        (lambda: NoisyInNameOnly(), False),
        (lambda: nn.Sequential(nn.Dropout(0.0), nn.AlphaDropout(0.0), nn.Linear(4, 4)), False),
        (lambda: Recurrent(0.0), False),
        (lambda: Attends(0.0), False),
        (lambda: Fused(0.0), False),
        (lambda: nn.Dropout(0.5).eval(), True),
        (Jitters, True),
        (RollsDice, True),
        (Permutes, True),
        (FillsBernoulli, True),
        (lambda: nn.RReLU(), True),
        (lambda: Recurrent(0.5), True),
        (lambda: Attends(0.5), True),
        (lambda: Fused(0.5), True),
    ],
)
def test_copies_are_accepted_where_random_numbers_are_drawn(behind: Callable[[], nn.Module], draws: bool) -> None:
    model, needs_sequence = Stem(behind()), not isinstance(behind(), Permutes | NoisyInNameOnly)
    inputs = (SEQUENCE if needs_sequence else X,)
    if draws:
        train_model = fxcollab.transform(model, splits=["stem"], init="copy", example_inputs=inputs)
        assert not torch.equal(*train_model.train()(*inputs))
    else:
        with pytest.raises(PatternError, match="never differ"):
            fxcollab.transform(model, splits=["stem"], init="copy", example_inputs=inputs)


# -------------------------------------------------------------------------- operators that run graphs


class RunsGraphs(nn.Module):
    """Writes into its input and its buffers beside an operator that runs graphs."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.inner, self.norm, self.operator = nn.Linear(4, 4), nn.BatchNorm1d(4), operator

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.norm(GRAPH_OPERATORS[self.operator](self, x))


class Twice(nn.Module):
    """What is written into is read again."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.stem, self.behind = nn.Linear(4, 4), behind

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.behind(h) + h


GRAPH_OPERATORS: dict[str, Callable[[RunsGraphs, Tensor], Tensor]] = {
    "cond": lambda self, x: torch.cond(x.sum() > 0, lambda t: self.inner(t).sin(), lambda t: t.cos(), (x,)),
    "cond that draws": lambda self, x: torch.cond(x.sum() > 0, lambda t: F.dropout(t), lambda t: t.cos(), (x,)),
    "while_loop": lambda self, x: while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t.sin()), (torch.tensor(0), x))[
        1
    ],
    "associative_scan": lambda self, x: associative_scan(torch.add, x, 0, combine_mode="generic"),
}


@pytest.mark.parametrize("operator", slow_but(["cond"], GRAPH_OPERATORS))
def test_what_a_module_does_beside_an_operator_that_runs_graphs_is_seen(operator: str) -> None:
    model = Twice(RunsGraphs(operator))
    train_model = fxcollab.transform(model, splits=["stem"], init="copy-anyway", example_inputs=(X,))
    assert copies(train_model) == 2
    if "draws" not in operator:  # the backward of torch.cond draws anew
        fxcollab.verify(model, train_model, (X[:3],)).raise_if_failed()
    effects = observe(fxcollab.capture(model, ["stem"], (X,))).effects
    [behind] = [found for node, found in effects.items() if node.target == "behind"]
    assert behind.changes == {f"behind.norm.{name}" for name, _ in model.behind.norm.named_buffers()}
    assert behind.random or "draws" not in operator


def test_an_exported_operator_that_runs_graphs_may_draw_and_writes_nothing() -> None:
    class Conditional(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            return self[1](torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,)))

    exported = torch.export.export(Conditional(nn.Linear(4, 4), nn.Linear(4, 2)), (X,)).module()
    effects = observe(fxcollab.capture(exported, example_inputs=(X,))).effects
    [cond] = [found for node, found in effects.items() if "cond" in node.name]
    assert cond.random and not cond.writes
    train_model = fxcollab.transform(exported, splits=["linear"], init="copy-anyway", example_inputs=(X,))
    assert copies(train_model) == 0
    fxcollab.verify(exported, train_model, (X,)).raise_if_failed()


class TakesNoFakes(torch.autograd.Function):
    """Its backward runs on real gradients only, like that of some of torch's operators."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        if isinstance(gradient, FakeTensor):
            raise TypeError("unsupported type")
        return gradient * 2


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return TakesNoFakes.apply(x)


def test_costs_that_torch_cannot_find_are_refused_with_a_way_out() -> None:
    with pytest.raises(fxcollab.CaptureError, match=r"costs of Twice can't be computed[\s\S]*name the splits"):
        fxcollab.find_splits(Twice(Doubles()), example_inputs=(X,))


# ------------------------------------------------------------------------------- what can't be observed


class TwoInputs(Stem):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.behind(self.stem(x)) + y)


class DependsOnData(nn.Module):
    """Kept whole."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return x
        return x.mul_(2) if self.writes else x * 2


@pytest.mark.parametrize("writes", [True, False])
def test_nodes_on_meta_that_depend_on_data_get_copies(writes: bool) -> None:
    train_model = fxcollab.transform(Stem(DependsOnData(writes)).to("meta"), splits=["stem"], init="copy-anyway")
    assert copies(train_model) == 2


@pytest.mark.parametrize("writes", [True, False])
def test_nodes_that_depend_on_data_are_observed_on_real_values(writes: bool) -> None:
    model = Stem(DependsOnData(writes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_model = fxcollab.transform(model, splits=["stem"], init="copy-anyway", example_inputs=(X,))
    assert copies(train_model) == (2 if writes else 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_of_several_inputs_without_examples_get_copies_where_nothing_is_known() -> None:
    for behind in (nn.ReLU(inplace=True), nn.Tanh()):
        train_model = fxcollab.transform(TwoInputs(behind), splits=["stem"], init="copy-anyway")
        assert copies(train_model) >= 2 or not isinstance(behind, nn.ReLU)
        train_model = fxcollab.transform(
            TwoInputs(behind), splits=["stem"], init="copy-anyway", example_inputs=(X, torch.ones(3, 4))
        )
        assert copies(train_model) == (2 if isinstance(behind, nn.ReLU) else 0)


class Elementwise(nn.Module):
    """No layer says what the inputs look like, and whole numbers can't be what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ReLU(), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x.view(-1).add_(0.5)
        return self.second(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_model_without_known_layers_is_observed_on_numbers_of_its_own_kind() -> None:
    captured = fxcollab.capture(Elementwise(), ["first"])
    observation = observe(captured)
    assert all(observation.of(node).certain for node in captured.graph.nodes)
