"""What is saved comes back exactly."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.io.artifact import load_head
from fxcollab.io.weights import load_state_dict, write_state_dict
from tests.io.helpers import Net, Registered, Tied, TwoModes, assert_same, floats, made, randomised, refused, seeded


@pytest.mark.parametrize(
    "options",
    [
        {"splits": ("a", "b")},
        {"splits": ("a", "b"), "fanouts": (2, 3)},
        {"splits": ("b",), "rescale": False},
        {"splits": ("b",), "pattern": "simple", "heads": 3},
        {"splits": (), "pattern": "multi-instance", "heads": 2},
        {"splits": ("b.0",), "granularity": "op", "peers": "others"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_training_model_comes_back_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    splits = options.pop("splits")
    with seeded(0):
        train_model = randomised(fxcollab.transform(Net, splits=splits, seed=5, **options))
    fxcollab.save(train_model, tmp_path / "run")
    assert_same(train_model, fxcollab.load(tmp_path / "run"), floats(5, 3))


def test_a_loaded_model_can_be_verified_pruned_and_saved_again(saved: Path, tmp_path: Path) -> None:
    train_model = fxcollab.load(saved)
    assert fxcollab.verify(train_model.root, train_model)
    original = Net()
    original.load_state_dict(fxcollab.prune(train_model, head=3).state_dict(), strict=True)
    fxcollab.save(train_model, tmp_path / "again")
    first, second = (json.loads((folder / "plan.json").read_text()) for folder in (saved, tmp_path / "again"))
    changed = {key for key in first if first[key] != second[key]}
    assert first.keys() == second.keys() and changed <= {"weights", "checksum", "signature"}  # of the file's bytes
    assert (tmp_path / "again/graph.py").read_text() == (saved / "graph.py").read_text()
    assert_same(train_model, fxcollab.load(tmp_path / "again"), floats(5, 3))


def test_saving_and_loading_leave_the_global_random_state_as_it_was(saved: Path) -> None:
    model = Net()
    before = torch.get_rng_state()
    fxcollab.save(fxcollab.load(saved, model), saved.with_name("other"))
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    train_model = randomised(made(Tied, "embed"))
    assert train_model.embed.weight is train_model.decode.weight
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run")
    assert loaded.embed.weight is loaded.decode.weight
    assert_same(train_model, loaded, torch.tensor([[0, 5], [2, 3]]))
    stored = load_file(tmp_path / "run/weights.safetensors")
    assert len(stored) == len(list(train_model.parameters())) < len(train_model.state_dict())


def test_a_tied_model_built_on_the_meta_device_loads_with_its_ties(tmp_path: Path) -> None:
    train_model = randomised(made(Tied, "embed"))
    fxcollab.save(train_model, tmp_path / "run")
    with torch.device("meta"):
        empty = Tied()
    loaded = fxcollab.load(tmp_path / "run", empty)
    assert loaded.embed.weight is loaded.decode.weight
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert_same(train_model, loaded, torch.tensor([[0, 5], [2, 3]]))
    assert empty.mix is loaded.mix, "the caller's own modules are in it"


def test_a_model_on_the_meta_device_is_transformed_but_not_saved_without_values(tmp_path: Path) -> None:
    with torch.device("meta"):
        train_model = fxcollab.transform(Net(), splits="a")
    error = refused(fxcollab.save, train_model, tmp_path / "run")
    assert "has no values" in error.what and "to_empty" in str(error.hint)
    assert not list(tmp_path.iterdir())


def test_strided_and_shared_tensors_come_back_with_their_values(tmp_path: Path) -> None:
    model = Net().double()
    whole = torch.arange(24.0, dtype=torch.float64)
    model.a.weight = nn.Parameter(whole[:12].view(3, 4).t(), requires_grad=False)
    model.c.weight = nn.Parameter(whole[8:16].view(2, 4), requires_grad=False)
    train_model = made(model, "b")
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run", Net())
    assert_same(train_model, loaded, floats(5, 3).double(), rounding=1e-10)  # other strides take other kernels


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = Net()
    model.a.weight = nn.Parameter(torch.arange(12.0).view(3, 4).t())
    train_model = made(model, "b").eval()
    before = {name: (t, t.clone(), t.stride()) for name, t in train_model.state_dict(keep_vars=True).items()}
    fxcollab.save(train_model, tmp_path / "run")
    for name, tensor in train_model.state_dict(keep_vars=True).items():
        same, value, stride = before[name]
        assert tensor is same and torch.equal(tensor, value) and tensor.stride() == stride
    assert not train_model.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_that_the_weights_were_saved_in_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    train_model = randomised(made(Net, "a", "b").to(dtype))
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run")
    assert_same(train_model, loaded, floats(5, 3).to(dtype))
    assert loaded.root.a.weight is loaded.a.weight


def test_structure_that_depends_on_the_mode_comes_back_in_both(tmp_path: Path) -> None:
    train_model = randomised(made(TwoModes))
    assert train_model.modes.differ
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run")
    assert loaded.modes.differ
    assert_same(train_model, loaded, floats(5, 3))


def test_state_of_the_root_itself_comes_back(tmp_path: Path) -> None:
    train_model = randomised(made(Registered))
    train_model.steps.fill_(11)
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run")
    assert loaded.steps == 11
    assert_same(train_model, loaded, floats(5, 3))


def test_a_graph_module_is_loaded_from_a_graph_module(tmp_path: Path) -> None:
    train_model = randomised(made(fx.symbolic_trace(Net()), "b"))
    fxcollab.save(train_model, tmp_path / "run")
    assert_same(train_model, fxcollab.load(tmp_path / "run", fx.symbolic_trace(Net())), floats(5, 3))


def test_the_given_model_is_the_one_that_is_trained(saved: Path) -> None:
    model = Net()
    weight = model.a.weight
    loaded = fxcollab.load(saved, model)
    assert loaded.root is model
    assert loaded.a.weight is weight
    assert torch.equal(weight, load_state_dict(saved / "weights.safetensors")["a.weight"])


def test_a_wrapped_training_model_is_saved_as_itself(tmp_path: Path) -> None:
    train_model = made(Net)
    fxcollab.save(torch.compile(nn.DataParallel(train_model)), tmp_path / "run")
    assert_same(train_model, fxcollab.load(tmp_path / "run"), floats(5, 3))


def test_other_weights_may_be_loaded_also_those_of_a_wrapped_model(saved: Path, tmp_path: Path) -> None:
    trained = randomised(fxcollab.load(saved))
    state = {f"module._orig_mod.{name}": value for name, value in trained.state_dict().items()}
    write_state_dict(state, tmp_path / "epoch9.safetensors")
    assert_same(trained, fxcollab.load(saved, weights=tmp_path / "epoch9.safetensors"), floats(5, 3))


def test_the_generated_forward_is_written_to_be_read(saved: Path) -> None:
    text = (saved / "graph.py").read_text()
    [function] = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert function.name == "forward"
    assert "self.peers.b0_1.c(" in text
    assert "= None" not in text


def test_this_module_is_importable_by_the_name_that_plans_note() -> None:
    assert sys.modules[Net.__module__].Net is Net


def test_extra_state_of_the_root_comes_back(tmp_path: Path) -> None:
    class Counting(Net):
        epoch = torch.tensor(0)

        def get_extra_state(self) -> Tensor:
            return self.epoch

        def set_extra_state(self, state: Tensor) -> None:
            self.epoch = state

    model = Counting()
    model.epoch = torch.tensor(3)
    train_model = made(model)
    assert list(train_model.state_dict())[: len(model.state_dict())] == list(model.state_dict())
    fxcollab.save(train_model, tmp_path / "run")
    other = Counting()
    fxcollab.load(tmp_path / "run", other)
    assert other.epoch == 3


class Versioned(nn.Linear):
    """Loads only what says of which version it is, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modules_are_told_of_which_version_their_state_is(tmp_path: Path, device: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), Versioned(3, 3), Versioned(3, 2))

    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run", model().to(device))
    assert_same(train_model, loaded, floats(4, 3))


class Wave(nn.Module):
    """A filter, its conjugate and its negative, which torch computes when they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("wave", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("conjugate", self.wave.conj())
        self.register_buffer("negative", torch._neg_view(torch.arange(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.conjugate.imag + self.negative)


def test_lazily_conjugated_and_negated_tensors_are_saved_as_what_they_are(tmp_path: Path) -> None:
    train_model = fxcollab.transform(Wave(), splits=["a"], seed=0)
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run", Wave())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in train_model.state_dict().items())
    write_state_dict(load_head(tmp_path / "run", 1), tmp_path / "head.safetensors")
    head = load_file(tmp_path / "head.safetensors")
    assert all(torch.equal(value, head[name]) for name, value in fxcollab.prune(train_model, 1).state_dict().items())


@pytest.mark.parametrize("given", ["meta", "bfloat16"])
def test_what_was_loaded_does_not_change_with_the_file(given: str, tmp_path: Path) -> None:
    train_model = made(Net)
    fxcollab.save(train_model.bfloat16() if given == "bfloat16" else train_model, tmp_path / "run")
    with torch.device("meta" if given == "meta" else "cpu"):
        model = Net()
    loaded, head = fxcollab.load(tmp_path / "run", model), load_head(tmp_path / "run", 1)
    file = tmp_path / "run/weights.safetensors"
    with file.open("r+b") as opened:  # in place
        start = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(start)
        opened.write(bytes(file.stat().st_size - start))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in train_model.state_dict().items())
    assert head["a.weight"].any() and head["c.weight"].any()


def test_state_with_the_name_of_the_header_is_refused(tmp_path: Path) -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("__metadata__", torch.ones(2))

    error = refused(fxcollab.save, made(Named), tmp_path / "run")
    assert "'__metadata__'" in error.what and not (tmp_path / "run").exists()
