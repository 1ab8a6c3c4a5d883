"""The training model shares the original's tensors, through conversions, loading and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxcollab
from tests.references import SmallConvNet
from tests.rewriting.state_helpers import assert_equal_states, chain, hoarder, images, mlp, one_step, snapshot


def test_training_the_training_model_trains_the_model() -> None:
    model, train_model = chain()
    before = snapshot(model)
    one_step(train_model, images())
    after = model.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name, _ in model.named_parameters())
    assert int(model.bn1.num_batches_tracked) == 1
    assert torch.equal(fxcollab.all_heads(train_model.eval())(images())[0], model.eval()(images()))


CONVERSIONS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "double of the training model": lambda model, train_model: train_model.double(),
    "to of the training model": lambda model, train_model: train_model.to(torch.float64),
    "double of the model": lambda model, train_model: model.double(),
    "load": lambda model, train_model: train_model.load_state_dict(snapshot(train_model)),
    "load by assignment": lambda model, train_model: train_model.load_state_dict(snapshot(train_model), assign=True),
    "load into the model by assignment": lambda model, train_model: model.load_state_dict(
        snapshot(model), assign=True
    ),
    "to_empty": lambda model, train_model: train_model.to_empty(device="cpu"),
    "share_memory": lambda model, train_model: train_model.share_memory(),
    "another parameter": lambda model, train_model: setattr(model.stem, "weight", nn.Parameter(torch.ones(4, 4))),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("overwrite", [False, True], ids=["in place", "overwriting"])
def test_sharing_lasts_through_conversions(conversion: str, overwrite: bool) -> None:
    model, train_model = hoarder()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        CONVERSIONS[conversion](model, train_model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    own = model.state_dict(keep_vars=True)
    trained = train_model.state_dict(keep_vars=True)
    assert all(trained[name] is own[name] for name in own)
    assert train_model.table is model.table
    for pruned in (fxcollab.prune(train_model), train_model.root):
        found = pruned.state_dict(keep_vars=True)
        assert all(found[name] is own[name] for name in own)


def test_conversion_reaches_peers_and_runs() -> None:
    _, train_model = hoarder()
    train_model.double()
    assert {t.dtype for t in train_model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert all(z.dtype == torch.float64 for z in train_model(torch.randn(5, 4, dtype=torch.float64)))


def test_an_original_checkpoint_loads_into_trunk_and_head_0() -> None:
    model, train_model = chain()
    peers = {name: value for name, value in snapshot(train_model).items() if name.startswith("peers.")}
    torch.manual_seed(99)
    other = SmallConvNet()
    result = train_model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys
    counters = {name for name in peers if name.endswith("num_batches_tracked")}  # torch doesn't miss these
    assert set(result.missing_keys) | counters == set(peers)
    assert_equal_states(model.state_dict(), other.state_dict())
    state = train_model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in peers.items())


def test_a_checkpoint_of_the_training_model_loads_into_another() -> None:
    _, one = chain(seed=1)
    _, other = chain(seed=2)
    one_step(one, images())
    other.load_state_dict(one.state_dict(), strict=True)
    assert_equal_states(one.state_dict(), other.state_dict())
    for z, expected in zip(
        fxcollab.all_heads(other.eval())(images()), fxcollab.all_heads(one.eval())(images()), strict=True
    ):
        assert torch.equal(z, expected)


@pytest.mark.parametrize("make", [mlp, hoarder, chain])
def test_a_deep_copy_has_all_keys_in_order_and_shares_nothing(make: Callable[[], Any]) -> None:
    model, train_model = make()
    new = copy.deepcopy(train_model)
    assert isinstance(new, fxcollab.CollabGraphModule) and new.code == train_model.code
    assert_equal_states(new.state_dict(), train_model.state_dict())
    own = {t.untyped_storage().data_ptr() for t in train_model.state_dict().values()}
    assert not any(t.untyped_storage().data_ptr() in own for t in new.state_dict().values())
    inside = new.state_dict(keep_vars=True)
    assert all(inside[name] is t for name, t in new.root.state_dict(keep_vars=True).items())
    assert_equal_states(fxcollab.prune(new, 1).state_dict(), fxcollab.prune(train_model, 1).state_dict())
    with torch.no_grad():
        next(new.parameters()).add_(1)
    assert not torch.equal(next(new.parameters()), next(model.parameters()))
