"""In eval mode a training model returns head 0's output, the mean over heads, or all."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fxcollab
from fxcollab.errors import ObjectiveError, PatternError, StateError
from tests.references import SkipNet, SmallConvNet
from tests.speeds import slow_but

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@dataclass
class Output:
    logits: Tensor
    best: Tensor


torch.utils._pytree.register_dataclass(Output)


class Structured(SmallConvNet):
    """Returns a dict, a tuple or a data class, with a tensor that has no gradient."""

    kind = "dict"

    def forward(self, x: Tensor) -> Any:
        z = super().forward(x)
        if self.kind == "dict":
            return {"logits": z, "best": z.argmax(1)}
        return (z, z.argmax(1)) if self.kind == "tuple" else Output(z, z.argmax(1))


class Tuple(Structured):
    kind = "tuple"


class DataClass(Structured):
    kind = "data class"


class Auxiliary(SmallConvNet):
    """In train mode it returns two values."""

    def forward(self, x: Tensor) -> Any:
        h = self.layer1(self.relu(self.bn1(self.conv1(x))))
        z = self.fc(self.pool(self.layer3(self.layer2(h))).flatten(1))
        return (z, h.mean()) if self.training else z


class Drops(SkipNet):
    """Draws in eval mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.3)


MODELS = (SmallConvNet, SkipNet, Structured, Tuple, DataClass, Auxiliary, Drops)


def made(make: type[nn.Module], **options: Any) -> tuple[nn.Module, fxcollab.CollabGraphModule]:
    torch.manual_seed(0)
    model = make()
    train_model = fxcollab.transform(model, splits=["layer1"], heads=3, pattern="simple", seed=1, **options)
    train_model(X)  # statistics move
    return model, train_model.eval()


def leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def called(model: nn.Module) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("make", MODELS)
def test_eval_mode_is_the_original(make: type[nn.Module]) -> None:
    model, train_model = made(make)
    found, expected = called(train_model), called(model.eval())
    assert type(found) is type(expected)
    assert [torch.equal(a, b) for a, b in zip(leaves(found), leaves(expected), strict=True)] == [True] * len(
        leaves(expected)
    )
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_eval_mode_computes_nothing_else() -> None:
    model, train_model = made(SmallConvNet)
    counts = []
    for each in (train_model, model.eval(), fxcollab.all_heads(train_model)):
        with FlopCounterMode(display=False) as counter:
            each(X)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] < counts[2]


def test_gradients_in_eval_mode_are_the_originals() -> None:
    model, train_model = made(SkipNet)
    train_model(X).sum().backward()
    found = {name: p.grad for name, p in train_model.named_parameters() if p.grad is not None}
    train_model.zero_grad()
    model.eval()(X).sum().backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p.grad, found[name]) for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", slow_but([SkipNet], MODELS))
def test_all_heads_are_returned_on_request_in_either_mode(make: type[nn.Module], training: bool) -> None:
    _, train_model = made(make)
    train_model.train(training)
    outputs = fxcollab.all_heads(train_model)(X)
    assert isinstance(outputs, tuple) and len(outputs) == 3
    assert not train_model.returns_all  # only that call
    if not training and make is not Drops:
        for head, output in enumerate(outputs):
            expected = fxcollab.prune(train_model, head)(X)
            assert all(torch.equal(a, b) for a, b in zip(leaves(output), leaves(expected), strict=True))


def test_a_call_of_all_heads_that_fails_leaves_eval_mode_as_it_was() -> None:
    _, train_model = made(SmallConvNet)
    with pytest.raises(RuntimeError):
        fxcollab.all_heads(train_model)(torch.zeros(1))
    assert isinstance(train_model(X), Tensor)


@pytest.mark.parametrize("make", slow_but([SmallConvNet, Structured], MODELS))
def test_the_mean_over_heads(make: type[nn.Module]) -> None:
    model, train_model = made(make, eval_output="mean")
    if make is Drops:
        return  # every head draws
    outputs = fxcollab.all_heads(train_model)(X)
    found = train_model(X)
    assert type(found) is type(outputs[0])
    for mean, *each in zip(leaves(found), *map(leaves, outputs), strict=True):
        assert torch.equal(mean, torch.stack(each).mean(0) if mean.is_floating_point() else each[0])
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_outputs_that_are_objects_have_no_mean() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Boxed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Box(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.box = nn.Linear(4, 4), nn.Linear(4, 4), Boxed()

        def forward(self, x: Tensor) -> Any:
            return self.box(self.b(self.a(x)))

    train_model = fxcollab.transform(
        Net(), splits=["a"], eval_output="mean", example_inputs=(torch.ones(2, 4),)
    ).eval()
    with pytest.raises(StateError, match="Box have no mean"):
        train_model(torch.ones(2, 4))


def test_all_is_the_tuple_in_both_modes() -> None:
    _, train_model = made(SmallConvNet, eval_output="all")
    assert len(train_model(X)) == len(train_model.train()(X)) == 3


def test_another_word_is_refused() -> None:
    with pytest.raises(PatternError, match="'first' is not a value of eval_output"):
        made(SmallConvNet, eval_output="first")


@pytest.mark.parametrize("eval_output", ["head", "mean"])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_return_the_same(eval_output: str, copied: Any) -> None:
    _, train_model = made(Structured, eval_output=eval_output)
    new = copied(train_model)
    assert torch.equal(new(X)["logits"], train_model(X)["logits"])
    assert len(fxcollab.all_heads(new)(X)) == 3
    assert new.code == train_model.code


class Lightning(nn.Module):
    """As users of Lightning hold the model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, fxcollab.CollaborativeLoss()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


@pytest.mark.parametrize(
    "wrapped",
    slow_but(
        [Lightning, nn.DataParallel],
        [Lightning, nn.DataParallel, lambda model: torch.compile(model, backend="eager", fullgraph=True)],
    ),
)
def test_all_heads_through_wrappers(wrapped: Any) -> None:
    _, train_model = made(SmallConvNet)
    wrapper = wrapped(train_model)
    one = wrapper(X)
    outputs = fxcollab.all_heads(wrapper)(X)
    assert isinstance(one, Tensor) and torch.equal(outputs[0], one) and len(outputs) == 3
    assert torch.equal(wrapper(X), one)


def test_two_training_models_in_one_wrapper_are_ambiguous() -> None:
    both = nn.ModuleList([made(SmallConvNet)[1], made(SmallConvNet)[1]])
    with pytest.raises(StateError, match="holds 2 training models"):
        fxcollab.all_heads(both)


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(StateError, match="is not a training model"):
        fxcollab.all_heads(SmallConvNet())


def test_an_objective_that_gets_one_output_says_what_to_call() -> None:
    _, train_model = made(SmallConvNet)
    with pytest.raises(ObjectiveError) as caught:
        fxcollab.CollaborativeLoss()(train_model(X), torch.zeros(4, dtype=torch.long))
    assert "fxcollab.all_heads(train_model)(x)" in str(caught.value.hint)
    fxcollab.CollaborativeLoss()(fxcollab.all_heads(train_model)(X), torch.zeros(4, dtype=torch.long))


def test_head_0_is_what_the_code_of_eval_mode_shows() -> None:
    _, train_model = made(SmallConvNet)
    *_, of_eval_mode = train_model.code.partition("    else:\n")
    assert "peers" not in of_eval_mode and "rescale" not in of_eval_mode


def test_a_saved_model_returns_the_same(tmp_path: Any) -> None:
    model, train_model = made(SmallConvNet, eval_output="mean")
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run", model=SmallConvNet).eval()
    assert torch.equal(loaded(X), train_model(X))
    assert not torch.equal(loaded(X), model.eval()(X))


def test_what_runs_the_graph_or_exports_it_gets_the_same() -> None:
    model, train_model = made(Structured)
    expected = model.eval()(X)["logits"]
    assert torch.equal(fx.Interpreter(train_model).run(X)["logits"], expected)
    assert torch.equal(torch.export.export(train_model, (X,)).module()(X)["logits"], expected)
    assert torch.equal(fx.symbolic_trace(train_model)(X)["logits"], expected)
    assert len(fx.Interpreter(train_model.train()).run(X)) == 3


def test_an_edit_of_the_training_graph_reaches_eval_mode() -> None:
    model, train_model = made(SmallConvNet)
    for node in train_model.train().graph.nodes:
        if node.target is torch.flatten:
            node.args = (node.args[0], -3)
    train_model.recompile()
    before = model.eval()(X)
    assert torch.equal(train_model.eval()(X), before)
    output = next(iter(reversed(train_model.train().graph.nodes)))
    with train_model.graph.inserting_before(output):
        negative = [train_model.graph.call_function(torch.neg, (head,)) for head in output.args[0]]
    output.args = (tuple(negative),)
    train_model.recompile()
    assert torch.equal(train_model.eval()(X), -before)


def test_an_edit_of_the_graph_of_eval_mode_is_refused() -> None:
    _, train_model = made(SmallConvNet)
    output = next(iter(reversed(train_model.graph.nodes)))
    with train_model.graph.inserting_before(output):
        output.args = (train_model.graph.call_function(torch.neg, (output.args[0],)),)
    with pytest.raises(StateError, match="eval mode can't be edited") as caught:
        train_model.recompile()
    assert "train_model.train().graph" in str(caught.value.hint)
    _, train_model = made(SmallConvNet)
    with pytest.raises(StateError, match="eval mode can't be edited"):
        train_model.graph = fx.Graph()
