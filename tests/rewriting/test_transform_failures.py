"""Models without values, transforms that fail, and modules that can't be copied."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

import fxcollab
from fxcollab.errors import FxCollabError, StateError
from fxcollab.runtime.private_copy import private_copy
from tests.references import SkipNet, SmallConvNet
from tests.rewriting.state_helpers import CHAIN, Mlp, assert_equal_states, chain, images, snapshot
from tests.untouched import Untouched

# ------------------------------------------------------------------------------------------------- without values


def test_a_model_on_meta_gets_peers_on_meta() -> None:
    with torch.device("meta"):
        model = SmallConvNet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_model = fxcollab.transform(model, **CHAIN, seed=0)
    assert all(value.is_meta for value in train_model.state_dict().values())
    assert list(train_model.state_dict()) == list(chain()[1].state_dict())
    assert [z.shape for z in train_model(images().to("meta"))] == [(4, 5)] * 4
    _, real = chain()
    train_model.load_state_dict(real.state_dict(), assign=True)
    found, expected = (fxcollab.all_heads(each.eval())(images()) for each in (train_model, real))
    assert [torch.equal(z, other) for z, other in zip(found, expected, strict=True)] == [True] * 4
    assert torch.equal(fxcollab.prune(train_model, 2)(images()), expected[2])


def test_a_model_on_meta_with_a_factory_stays_on_meta() -> None:
    def factory() -> SmallConvNet:
        with torch.device("meta"):
            return SmallConvNet()

    train_model = fxcollab.transform(factory, **CHAIN, seed=0)
    assert all(value.is_meta for value in train_model.state_dict().values())


def test_transform_under_fake_tensors() -> None:
    with FakeTensorMode():
        model = SmallConvNet()
        train_model = fxcollab.transform(model, **CHAIN, seed=0)
        outputs = train_model(torch.randn(4, 3, 8, 8))
        assert all(isinstance(z, FakeTensor) and z.shape == (4, 5) for z in outputs)
        assert all(isinstance(value, FakeTensor) for value in train_model.state_dict().values())
        sum(z.sum() for z in outputs).backward()
        assert fxcollab.prune(train_model, 1)(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert list(train_model.state_dict()) == list(chain()[1].state_dict())


# ----------------------------------------------------------------------------------------------- after a failure


@pytest.mark.parametrize(
    "options",
    [
        {"splits": ["nowhere"]},
        {"splits": ["layer2", "layer1"]},
        {"splits": ["fc"]},
        {**CHAIN, "fanouts": (2,)},
        {**CHAIN, "init": "copy"},
        {**CHAIN, "init": "warm"},
        {**CHAIN, "factory": SkipNet},
        {**CHAIN, "peers": "fc"},
        {"pattern": "simple", "splits": ["layer1"], "heads": 1},
    ],
    ids=str,
)
def test_a_failed_transform_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = SmallConvNet()
    state, tensors = snapshot(model), {id(value) for value in model.state_dict(keep_vars=True).values()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    with pytest.raises(FxCollabError):
        fxcollab.transform(model, **options)
    assert_equal_states(model.state_dict(), state)
    assert {id(value) for value in model.state_dict(keep_vars=True).values()} == tensors
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), random_state)


# ------------------------------------------------------------------------------------- what can't be copied or read


class Uncopyable(nn.Linear):
    """Says itself that it can't be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise NotImplementedError("one of a kind")


def holding(value: Callable[[nn.Module], Any]) -> nn.Module:
    model = Mlp()
    model.second = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model.second[1].held = value(model)
    return model


@pytest.mark.parametrize(
    ("hold", "where", "why"),
    [
        (lambda model: threading.Lock(), "second.1.held (lock)", "cannot pickle '_thread.lock' object"),
        (lambda model: {"key": iter(())}.values(), "second.1.held (dict_values)", "dict_values"),
    ],
    ids=["lock", "view"],
)
def test_a_module_with_something_that_cant_be_copied_is_named(hold: Any, where: str, why: str) -> None:
    model = holding(hold)
    before = Untouched(model)
    with pytest.raises(StateError, match="can't be copied") as caught:
        fxcollab.transform(model, "simple", ["first"], seed=0)
    assert caught.value.where == where and why in str(caught.value.why)
    assert "before the transform" in str(caught.value.hint) and "__deepcopy__" in str(caught.value.hint)
    assert before.differences() == []


def test_a_module_that_refuses_to_be_copied_is_named() -> None:
    model = holding(lambda model: None)
    model.second[1] = Uncopyable(6, 6)
    with pytest.raises(StateError, match="can't be copied") as caught:
        fxcollab.transform(model, "simple", ["first"], seed=0)
    assert caught.value.where == "second.1" and caught.value.why == "NotImplementedError: one of a kind"


def test_what_an_earlier_call_has_left_is_copied_without_its_graph() -> None:
    model = holding(lambda model: [model(torch.ones(1, 4))])
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    [left], [own] = train_model.get_submodule("peers.b1.second.1").held, model.second[1].held
    assert left.grad_fn is None and torch.equal(left, own) and left is not own


def test_what_cant_be_copied_may_lie_before_the_split() -> None:
    model = Mlp()
    model.first.lock = threading.Lock()
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    assert train_model.first is model.first
    assert "peers.b1.second.weight" in train_model.state_dict()
    fxcollab.verify(model, train_model, (torch.ones(2, 4),)).raise_if_failed()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore:no module initialises")
@pytest.mark.parametrize("inside", [False, True])
def test_a_traced_module_behind_a_split_may_do_anything_to_its_input(inside: bool) -> None:
    traced = torch.jit.trace(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), torch.ones(1, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(traced) if inside else traced)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    train_model = fxcollab.transform(model, "simple", ["0"], seed=0)
    assert any(node.target is private_copy for node in train_model.graph.nodes)
    assert torch.equal(train_model(x)[0], expected)
