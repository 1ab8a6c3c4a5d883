"""Heads are never mixed: what lacks a tensor, or has another one, is refused, and nothing is half loaded."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fxcollab
from fxcollab.errors import ArtifactError, DamagedError, FxCollabError, MixedError, StateError
from fxcollab.io.artifact import load_head
from fxcollab.io.weights import load_state_dict
from tests.io.helpers import Net, made, refused


@pytest.mark.parametrize("splits", [("a",), ("a", "b")])
def test_no_tensor_of_a_head_may_be_missing_from_a_state_dict(splits: tuple[str, ...]) -> None:
    state = dict(made(Net, *splits).state_dict())
    head = 2 ** len(splits) - 1
    for key in [key for key in state if key.startswith(f"peers.b{'_'.join('1' * len(splits))}.")]:
        with pytest.raises(MixedError, match=key):
            fxcollab.prune_state_dict({k: v for k, v in state.items() if k != key}, head)


def test_a_module_of_one_tensor_is_missed_where_torch_saved_the_state() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Linear(4, 2, bias=False)

    file = io.BytesIO()
    state = made(Plain).state_dict()
    torch.save(state, file)
    file.seek(0)
    for found in (state, torch.load(file, weights_only=True)):
        del found["peers.b1.c.weight"]
        with pytest.raises(MixedError, match=r"peers\.b1\.c\.weight"):
            fxcollab.prune_state_dict(found, 1)


def test_parameters_of_which_only_some_have_peers_are_no_loss() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([torch.ones(3), torch.ones(4)])
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x * self.scales[0]) * self.scales[1])

    state = made(Scales).state_dict()
    assert "peers.b1.scales.1" in state and "peers.b1.scales.0" not in state
    for checkpoint in (state, dict(state)):
        assert fxcollab.prune_state_dict(checkpoint, 1)["scales.1"] is state["peers.b1.scales.1"]


@pytest.mark.parametrize("change", [Tensor.half, Tensor.long, lambda tensor: tensor[:1], lambda tensor: tensor[None]])
def test_a_peer_of_another_shape_or_type_than_its_original_is_refused(change: Any) -> None:
    state = dict(made(Net).state_dict())
    state["peers.b1.c.weight"] = change(state["peers.b1.c.weight"])
    with pytest.raises(MixedError, match=r"c\.weight is"):
        fxcollab.prune_state_dict(state, 1)
    assert fxcollab.prune_state_dict(state, 0)


def test_peers_of_no_branch_are_not_taken_for_the_originals() -> None:
    for name in ("b9999999", "b" + "9" * 5000, "b" + "_".join("1" * 100), "b01", "b\u0663", "x", "b1"):
        with pytest.raises(FxCollabError):
            fxcollab.prune_state_dict(
                {"w": torch.ones(1), f"peers.{name}.w" if name != "b1" else "peers.b1": torch.ones(1)}
            )


def checkpoint_of(saved: Path, **changes: Any) -> Path:
    file = saved.with_name("other.safetensors")
    state = {key: value.clone() for key, value in load_state_dict(saved / "weights.safetensors").items()}
    for key, change in changes.items():
        state[key] = change(state[key])
    save_file(state, file)
    return file


@pytest.mark.parametrize(
    "change",
    [
        {"peers.b1_1.c.weight": Tensor.half},
        {"a.weight": Tensor.half, "c.weight": Tensor.long},
        {"b.1.num_batches_tracked": Tensor.float},
        {"a.weight": lambda tensor: tensor[:2]},
    ],
)
def test_a_checkpoint_with_other_types_or_shapes_is_refused_and_the_given_model_is_as_it_was(
    saved: Path, change: dict[str, Any]
) -> None:
    model = Net()
    before = {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}
    file = checkpoint_of(saved, **change)
    with pytest.raises(FxCollabError):
        fxcollab.load(saved, model, weights=file)
    with pytest.raises(MixedError):
        load_head(saved, 3, weights=file)
    assert all(v.dtype == before[k][0] and torch.equal(v, before[k][1]) for k, v in model.state_dict().items())


def test_a_checkpoint_all_of_another_type_is_taken(saved: Path) -> None:
    state = load_state_dict(saved / "weights.safetensors")
    halves = {key: value.half() if value.is_floating_point() else value.clone() for key, value in state.items()}
    save_file(halves, saved.with_name("half.safetensors"))
    assert load_head(saved, 3, weights=saved.with_name("half.safetensors"))["c.weight"].dtype is torch.float16


class Refusing(nn.Linear):
    """Fails to load its state."""

    def _load_from_state_dict(self, *_: Any) -> None:
        raise RuntimeError("not today")


def test_a_module_that_fails_to_load_leaves_the_given_model_as_it_was(saved: Path) -> None:
    model = Net()
    model.c = Refusing(4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match="RuntimeError: not today"):
        fxcollab.load(saved, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_save_are_noticed_by_their_checksum(saved: Path) -> None:
    other = fxcollab.save(made(Net, "a", "b", seed=9), saved.with_name("other"))
    (other / "weights.safetensors").replace(saved / "weights.safetensors")
    assert refused(fxcollab.load, saved).what == "The weights are not those that the plan was written with."
    with pytest.raises(DamagedError):
        load_head(saved, 1)
    assert fxcollab.load(saved, weights=saved / "weights.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [("fxcollab.aliases", '{"peers.b1.c.weight": "c.weight"}'), ("fxcollab.order", '["a.weight"]')],
)
def test_metadata_of_other_tensors_are_refused(tmp_path: Path, key: str, value: str) -> None:
    folder = fxcollab.save(made(Net), tmp_path / "run")
    file = folder / "weights.safetensors"
    save_file(load_file(file), file, {key: value})
    for read in (fxcollab.load, load_head):
        with pytest.raises(ArtifactError, match="metadata"):
            read(folder)


def test_a_whole_branch_that_is_lost_is_missed_where_the_state_says_which_there_were() -> None:
    state = made(Net, "a", "b").state_dict()
    for key in [key for key in state if key.startswith("peers.b0_1.")]:
        del state[key]
    with pytest.raises(MixedError, match=r"peers\.b0_1"):
        fxcollab.prune_state_dict(state, 1)


@pytest.mark.parametrize("metadata", [None, {3: {}}, {"peers.b1": None}, {"peers.b1": {"fxcollab.names": 5}}])
def test_strange_metadata_of_a_state_are_passed_over(metadata: Any) -> None:
    state = made(Net).state_dict()
    state._metadata = metadata
    assert torch.equal(fxcollab.prune_state_dict(state, 1)["c.weight"], state["peers.b1.c.weight"])


@pytest.mark.parametrize("infix", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_two_tensors_for_one_name_are_refused(infix: str) -> None:
    state = dict(made(Net).state_dict())
    state[f"peers.b1.{infix}c.weight"] = state["c.weight"]
    with pytest.raises(StateError, match="two tensors for one name"):
        fxcollab.prune_state_dict(state, 1)


def test_a_peer_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(MixedError, match="NoneType"):
        fxcollab.prune_state_dict(dict(made(Net).state_dict()) | {"peers.b1.c.weight": None}, 1)


def test_weights_that_call_a_peers_tensor_another_name_of_the_originals_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "weights.safetensors")
    order = json.dumps(list(tensors))
    del tensors["peers.b1_1.c.weight"]
    aliases = json.dumps({"peers.b1_1.c.weight": "c.weight"})
    file = saved.parent / "aliased.safetensors"
    save_file(tensors, file, {"fxcollab.order": order, "fxcollab.aliases": aliases})
    for read in (lambda: load_head(saved, 3, weights=file), lambda: fxcollab.load(saved, Net(), weights=file)):
        with pytest.raises(MixedError, match="one tensor with others"):
            read()


def test_a_module_that_fails_to_load_leaves_a_model_on_meta_as_it_was(saved: Path) -> None:
    model = Net()
    model.c = Refusing(4, 2)
    model.to("meta")
    before = model.state_dict(keep_vars=True)
    with pytest.raises(ArtifactError, match="RuntimeError: not today"):
        fxcollab.load(saved, model)
    assert all(tensor is before[name] and tensor.is_meta for name, tensor in model.state_dict(keep_vars=True).items())


def with_expanded_buffer() -> nn.Module:
    """A model with a buffer that can't be written: two of its values are one in memory."""
    model = Net()
    model.register_buffer("many", torch.ones(1).expand(2))
    return model


def test_a_load_that_torch_refuses_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    fxcollab.save(fxcollab.transform(with_expanded_buffer(), splits=["a"], seed=0), tmp_path / "run")
    mine = with_expanded_buffer()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(ArtifactError, match="can't be loaded"):
        fxcollab.load(tmp_path / "run", mine)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


def test_a_head_that_torch_does_not_load_leaves_the_model_as_it_was() -> None:
    train_model = fxcollab.transform(with_expanded_buffer(), splits=["a"], seed=0)
    mine = with_expanded_buffer()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(fxcollab.StateError, match="can't be loaded into Net"):
        fxcollab.prune(train_model, 1, into=mine)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(fxcollab.StateError, match="has no values"):
        fxcollab.prune(fxcollab.transform(Net(), splits=["a"], seed=0), 1, into=empty)


class Ties(nn.Module):
    """An embedding and a decoder, and two layers, which may be tied."""

    def __init__(self, tied: bool = False, across: bool = False) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.up, self.down, self.decode = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        if tied:
            self.down.weight = self.up.weight
        if across:
            self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.down(self.up(self.mix(self.embed(tokens)))))


@pytest.mark.parametrize("ties", [{"tied": True}, {"across": True}, {"tied": True, "across": True}])
def test_a_model_that_ties_what_a_head_has_apart_is_refused_and_stays_as_it_was(ties: dict[str, bool]) -> None:
    train_model = fxcollab.transform(Ties(), splits=["mix"], seed=0)
    model = Ties(**ties)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MixedError, match="several names are one tensor"):
        fxcollab.prune(train_model, 1, into=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tied = fxcollab.transform(Ties(**ties), splits=["mix"], seed=0)
    fxcollab.prune(tied, 0, into=model)  # whose ties are the same


@pytest.mark.parametrize("meta", [False, True])
def test_saved_weights_are_not_loaded_into_a_model_that_ties_them(meta: bool, tmp_path: Path) -> None:
    fxcollab.save(fxcollab.transform(Ties(), splits=["mix"], seed=0), tmp_path / "run")
    with torch.device("meta" if meta else "cpu"):
        model = Ties(tied=True)
    with pytest.raises(MixedError, match="several names are one tensor"):
        fxcollab.load(tmp_path / "run", model)


def test_a_checkpoint_that_has_tied_weights_apart_is_not_loaded(tmp_path: Path) -> None:
    train_model = fxcollab.transform(Ties(tied=True), splits=["mix"], seed=0)
    fxcollab.save(train_model, tmp_path / "run")
    state = {name: value.clone() for name, value in train_model.state_dict().items()}
    save_file(state, tmp_path / "same.safetensors")
    fxcollab.load(tmp_path / "run", Ties(tied=True), weights=tmp_path / "same.safetensors")
    state["peers.b1.up.weight"] += 1
    save_file(state, tmp_path / "apart.safetensors")
    with pytest.raises(MixedError, match=r"(?s)several names are one tensor|peers\.b1\.up"):
        fxcollab.load(tmp_path / "run", Ties(tied=True), weights=tmp_path / "apart.safetensors")


def test_weights_are_not_cut_to_integers() -> None:
    train_model = made(Net)
    model = Net()
    del model.c.weight
    model.c.register_buffer("weight", torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(StateError, match="another shape or type"):
        fxcollab.prune(train_model, 1, into=model)
    assert not model.c.weight.any()
    half = fxcollab.prune(train_model, 1, into=Net().half())
    assert torch.equal(half.c.weight, fxcollab.prune(train_model, 1).c.weight.half())


class Caches(nn.Module):
    """A buffer that no state dict has, and may be another one too; extra state; a hook that counts loads."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("cache", self.scale if tied else torch.full((2,), 3.0), persistent=False)
        self.register_buffer("loads", torch.zeros(()))
        self.extra = torch.tensor([1.0])
        self.register_load_state_dict_post_hook(lambda module, _: vars(module.loads.add_(1)).update())

    def get_extra_state(self) -> Tensor:
        return self.extra

    def set_extra_state(self, state: Tensor) -> None:
        self.extra = state

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.scale + self.cache


def test_buffers_that_no_state_dict_has_are_not_mixed_and_extra_state_is_put_back() -> None:
    train_model = fxcollab.transform(Caches(), splits=["a"], seed=0)
    fxcollab.original(train_model).extra = torch.tensor([5.0])
    fxcollab.prune(train_model, 1, into=Caches())  # counts its loads
    model = Caches(tied=True)
    with pytest.raises(MixedError, match="several names are one tensor"):
        fxcollab.prune(train_model, 1, into=model)
    assert model.extra.item() == 1 and torch.equal(model.scale, torch.ones(2)) and not model.loads


class Marked(Tensor):
    pass


def test_ties_of_subclasses_of_tensors_are_seen() -> None:
    train_model = fxcollab.transform(Ties(), splits=["mix"], seed=0)
    model = Ties()
    model.up.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Marked))
    model.down.weight = model.up.weight
    with pytest.raises(MixedError, match="several names are one tensor"):
        fxcollab.prune(train_model, 1, into=model)


@pytest.mark.parametrize("layout", ["csr", "two tensors"])
def test_a_model_with_tensors_of_no_memory_of_their_own_gets_a_head(layout: str) -> None:
    class Held(Net):
        def __init__(self) -> None:
            super().__init__()
            held = torch.eye(2).to_sparse_csr() if layout == "csr" else TwoTensor(torch.ones(3), torch.ones(3))
            self.register_buffer("held", held, persistent=False)

    train_model = made(Net)
    found = fxcollab.prune(train_model, 1, into=Held())
    assert torch.equal(found.c.weight, fxcollab.prune(train_model, 1).c.weight)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("head", [0, 1])
def test_a_heads_state_dict_has_the_versions_of_its_modules(prefix: str, head: int) -> None:
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
            if metadata.get("version", 1) < 2:
                state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
            super()._load_from_state_dict(state, prefix, metadata, *others)

    class Old(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = Versioned(3, 4), Versioned(4, 2)

    train_model = made(Old)
    around: nn.Module = nn.ModuleDict({"module": train_model}) if prefix else train_model
    model = Old()
    model.load_state_dict(fxcollab.prune_state_dict(around.state_dict(), head))
    expected = fxcollab.prune(train_model, head)
    assert torch.equal(model.a.weight, expected.a.weight) and torch.equal(model.c.weight, expected.c.weight)


def test_a_buffer_with_values_in_a_model_on_meta_does_not_stay_the_files(tmp_path: Path) -> None:
    class Classes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("classes", torch.arange(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.classes

    fxcollab.save(made(Classes), tmp_path / "run")
    with torch.device("meta"):
        model = Classes()
    model.classes = torch.zeros(2)
    try:
        loaded = fxcollab.load(tmp_path / "run", model)
    except ArtifactError:  # where mixed devices can't be observed, which is told
        return
    (tmp_path / "run/weights.safetensors").open("r+b").write(bytes(1 << 16))
    assert torch.equal(loaded.state_dict()["classes"], torch.arange(2.0))
