"""State and names: what belongs to the original, and what lives under `peers`."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.errors import StateError
from tests.references import SmallConvNet
from tests.rewriting.state_helpers import Mlp, assert_equal_states, chain, hoarder, mlp

# ------------------------------------------------------------------------------------------------ names and order


@pytest.mark.parametrize("make", [mlp, hoarder, chain])
def test_the_state_dict_begins_with_the_originals(make: Callable[[], Any]) -> None:
    model, train_model = make()
    own, trained = list(model.state_dict()), list(train_model.state_dict())
    assert trained[: len(own)] == own
    assert all(name.startswith("peers.") for name in trained[len(own) :]) and len(trained) > len(own)
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        names = [name for name, _ in getattr(model, kind)(remove_duplicate=False)]
        assert [name for name, _ in getattr(train_model, kind)(remove_duplicate=False)][: len(names)] == names


def test_peers_live_under_branch_and_original_name() -> None:
    _, train_model = chain(fanouts=(2, 3))
    branches = {name.split(".")[1] for name in train_model.state_dict() if name.startswith("peers.")}
    assert branches == {"b1", "b0_1", "b0_2", "b1_0", "b1_1", "b1_2"}
    level_1 = {name for name in train_model.state_dict() if name.startswith("peers.b1.")}
    assert level_1 == {f"peers.b1.{name}" for name in SmallConvNet().state_dict() if name.startswith("layer2.")}
    level_2 = {name for name in train_model.state_dict() if name.startswith("peers.b1_2.")}
    assert level_2 == {
        f"peers.b1_2.{name}" for name in SmallConvNet().state_dict() if name.startswith(("layer3.", "fc."))
    }
    assert {"layer2", "layer2_b1", "layer3", "layer3_b0_1", "layer3_b1_2", "fc_b1_0"} <= {
        node.name for node in train_model.graph.nodes
    }


def test_unused_modules_aliases_ties_and_transient_buffers_are_kept() -> None:
    model, train_model = hoarder()
    for name in ("unused_gain", "unused", "alias", "body.a", "norm", "counter"):
        assert name in dict(train_model.named_modules(remove_duplicate=False)) | dict(
            train_model.named_parameters()
        ) | dict(train_model.named_buffers())
    assert train_model.alias is train_model.body["a"] is model.alias
    assert "table" not in train_model.state_dict() and train_model.table is model.table
    assert train_model.absent is None and "absent" in train_model._parameters
    assert train_model.twin.weight is train_model.head.weight is model.head.weight


def test_ties_are_kept_inside_every_branch_and_broken_between_them() -> None:
    model, train_model = hoarder()
    for branch in ("b1", "b2"):
        peers = train_model.peers.get_submodule(branch)
        assert peers.twin.weight is peers.head.weight
        assert peers.head.weight is not model.head.weight
        assert not torch.equal(peers.head.weight, model.head.weight)
    assert train_model.peers.b1.head.weight is not train_model.peers.b2.head.weight


def test_what_is_used_on_both_sides_of_a_split_stays_shared() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.own = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.own(self.shared(x)))

    model = Reused()
    train_model = fxcollab.transform(model, "simple", ["shared@1"], heads=3, seed=0)
    assert list(train_model.state_dict()) == [
        *model.state_dict(), *(f"peers.{b}.own.{p}" for b in ("b1", "b2") for p in ("weight", "bias"))
    ]  # fmt: skip
    for head in range(3):
        pruned = fxcollab.prune(train_model, head)
        assert pruned.shared.weight is model.shared.weight


@pytest.mark.parametrize("make", [mlp, hoarder, chain])
def test_no_branch_shares_storage_with_another(make: Callable[[], Any]) -> None:
    _, train_model = make()
    owners: dict[int, str] = {}
    for name, tensor in train_model.state_dict(keep_vars=True).items():
        branch = name.split(".")[1] if name.startswith("peers.") else ""
        assert owners.setdefault(tensor.untyped_storage().data_ptr(), branch) == branch, name


def test_state_dict_hooks_of_the_root_still_run() -> None:
    model = Mlp()
    model.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update({"seen": torch.ones(1)}))
    loaded: list[bool] = []
    model.register_load_state_dict_pre_hook(lambda *args: loaded.append(bool(args[1].pop("seen"))))
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    state = train_model.state_dict()
    assert "seen" in state
    train_model.load_state_dict(state)
    assert loaded == [True]


class Counting(Mlp):
    """Keeps state that is no tensor."""

    steps = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_extra_state_of_the_root_is_kept() -> None:
    model = Counting()
    model.steps = 3
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    assert list(train_model.state_dict())[: len(model.state_dict())] == list(model.state_dict())
    for source in (train_model, copy.deepcopy(train_model), pickle.loads(pickle.dumps(train_model))):
        for head in (0, 1):
            new = Counting()
            new.load_state_dict(fxcollab.prune(source, head).state_dict(), strict=True)
            assert new.steps == 3
    into = Counting()
    assert fxcollab.prune(train_model, 1, into=into).steps == 3
    train_model.load_state_dict({**train_model.state_dict(), "_extra_state": {"steps": 5}})
    assert model.steps == 5


class Versioned(Mlp):
    """Writes its own entries under other names, and reads both."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3))
        self.versions: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x) * self.scale
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}gain"] = destination.pop(f"{prefix}scale")

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        self.versions.append(metadata["version"])
        state[f"{prefix}scale"] = state.pop(f"{prefix}gain")
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("copied", [False, True])
def test_what_the_root_makes_of_its_own_entries_is_kept(copied: bool) -> None:
    model = Versioned()
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    train_model = pickle.loads(pickle.dumps(train_model)) if copied else train_model
    own, state = list(model.state_dict()), train_model.state_dict()
    assert "gain" in own and list(state)[: len(own)] == own
    state["gain"] = torch.full((3,), 2.0)
    assert not any(train_model.load_state_dict(state))
    assert train_model.root.versions == [3] and train_model.scale.tolist() == [2.0] * 3
    assert train_model.state_dict().keys() == state.keys()
    into = fxcollab.prune(train_model, 0, into=Versioned())
    assert into.scale.tolist() == [2.0] * 3 and into.versions == [3]


class Partial(Mlp):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return without_first(super().state_dict(*args, **kwargs))


class Lenient(Mlp):
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def without_first(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.startswith("first.")}


def patched() -> nn.Module:
    model = Mlp()
    model.state_dict = types.MethodType(lambda self: without_first(nn.Module.state_dict(self)), model)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("make", [Partial, patched])
def test_a_state_dict_of_the_roots_own_is_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(StateError, match="has a state_dict of its own") as caught:
        fxcollab.transform(model, "simple", ["first"])
    assert caught.value.where == f"{type(model).__name__}.state_dict"
    assert "register_state_dict_post_hook" in str(caught.value.hint)


class Renames(Mlp):
    """Takes checkpoints of an earlier version."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        renamed = {name.replace("old.", "first."): value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, strict, assign)


@pytest.mark.parametrize("make", [Lenient, Renames])
def test_a_load_state_dict_of_the_roots_own_is_used_by_the_model_alone_which_is_said(make: type[Mlp]) -> None:
    model = make()
    with pytest.warns(UserWarning, match="load_state_dict of .* is its own"):
        train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    other = Mlp()
    train_model.load_state_dict({**train_model.state_dict(), **other.state_dict()})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    fxcollab.prune(train_model, head=1, into=make())


def test_the_hooks_to_use_instead_keep_the_keys() -> None:
    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}first.")]:
            del state[name]

    def fill_in(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, value in model.first.state_dict(prefix=f"{prefix}first.").items():
            state.setdefault(name, value)

    model = Mlp()
    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_pre_hook(fill_in)
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    own, state = list(model.state_dict()), train_model.state_dict()
    assert not any(name.startswith("first.") for name in own) and list(state)[: len(own)] == own
    assert list(fxcollab.prune_state_dict(state, 1)) == own
    assert not any(train_model.load_state_dict(state))
    fxcollab.verify(model, train_model, (torch.randn(2, 4),)).raise_if_failed()


def test_extra_state_inside_is_kept_for_every_head() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(3, 2))
    model[1].steps = 3
    for splits in (["0"], ["0", "1.first"]):
        train_model = fxcollab.transform(model, splits=splits, seed=0)
        for head in range(2 ** len(splits)):
            state = fxcollab.prune(train_model, head).state_dict()
            assert list(state) == list(model.state_dict()) and state["1._extra_state"] == {"steps": 3}


def test_frozen_parameters_have_frozen_peers() -> None:
    model = Mlp()
    model.third.weight.requires_grad_(False)
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    assert not train_model.peers.b1.third.weight.requires_grad
    assert train_model.peers.b1.third.bias.requires_grad
    assert torch.equal(train_model.peers.b1.third.weight, model.third.weight)  # or it would stay random for good
    assert not torch.equal(train_model.peers.b1.third.bias, model.third.bias)


def test_parametrized_weights_are_peers_of_their_own() -> None:
    torch.manual_seed(0)
    model = Mlp()
    nn.utils.parametrizations.weight_norm(model.second)
    nn.utils.parametrizations.spectral_norm(model.third)
    with pytest.warns(UserWarning, match="no module initialises"):
        train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    x = torch.randn(5, 4)
    one, other = train_model(x)
    assert not torch.equal(one, other)
    name = "second.parametrizations.weight.original1"
    assert not torch.equal(train_model.get_parameter(f"peers.b1.{name}"), model.get_parameter(name))
    model.load_state_dict(fxcollab.prune_state_dict(train_model.state_dict(), 1), strict=True)


# ------------------------------------------------------------------------------------------------- another "peers"


class Pops(Mlp):
    """A model with peers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.peers = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.peers(super().forward(x))


def test_a_model_with_peers_of_its_own_is_refused() -> None:
    model = Pops()
    before = set(model.__dict__)
    with pytest.raises(StateError, match=r"attribute 'peers'[\s\S]*hint: .*peers="):
        fxcollab.transform(model, "simple", ["first"])
    assert set(model.__dict__) == before


def test_peers_take_another_name() -> None:
    torch.manual_seed(0)
    model = Pops()
    train_model = fxcollab.transform(model, "simple", ["first"], heads=3, seed=0, peers="others")
    state = train_model.state_dict()
    assert list(state)[: len(model.state_dict())] == list(model.state_dict())
    assert "others.b2.peers.weight" in state and "self.others.b1.second(" in train_model.code
    new = Pops()
    x = torch.randn(2, 4)
    for head, expected in enumerate(train_model(x)):
        assert_equal_states(
            fxcollab.prune_state_dict(state, head, peers="others"), fxcollab.prune(train_model, head).state_dict()
        )
        fxcollab.prune(train_model, head, into=new)
        assert torch.equal(new(x), expected)
    with pytest.raises(StateError, match="holds no peers"):
        fxcollab.prune_state_dict(state, 0)
    assert all(torch.equal(a, b) for a, b in zip(copy.deepcopy(train_model)(x), train_model(x), strict=True))
