"""One head's weights, read from an artifact without the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fxcollab
from fxcollab.errors import PatternError, StateError
from fxcollab.io.artifact import load_head
from fxcollab.io.weights import write_state_dict
from tests.io.helpers import Net, Tied, made, randomised, refused


def test_a_head_is_read_without_the_model(saved: Path) -> None:
    train_model = fxcollab.load(saved)
    for head in range(4):
        expected = fxcollab.prune(train_model, head).state_dict()
        found = load_head(saved, head)
        assert list(found) == list(Net().state_dict())
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_head_of_a_later_checkpoint_is_read(saved: Path, tmp_path: Path) -> None:
    trained = randomised(fxcollab.load(saved))
    state = {f"module.{name}": value for name, value in trained.state_dict().items()}
    write_state_dict(state, tmp_path / "later.safetensors")
    found = load_head(saved, 2, weights=tmp_path / "later.safetensors")
    assert torch.equal(found["c.weight"], trained.get_parameter("peers.b1_0.c.weight"))


def test_a_head_is_refused_where_there_is_none(saved: Path) -> None:
    for head in (4, -1):
        with pytest.raises(PatternError, match=f"There is no head {head}"):
            load_head(saved, head)


def test_a_head_of_another_tree_or_of_no_tree_is_refused(saved: Path, tmp_path: Path) -> None:
    write_state_dict(made(Net, "a", pattern="simple", heads=4).state_dict(), tmp_path / "other.safetensors")
    error = refused(load_head, saved, 2, weights=tmp_path / "other.safetensors")
    assert error.what == "The weights are those of another head tree."
    assert "branches b1, b2, b3" in str(error.why)
    write_state_dict(Net().state_dict(), tmp_path / "single.safetensors")
    with pytest.raises(StateError, match="holds no peers"):
        load_head(saved, 0, weights=tmp_path / "single.safetensors")


def test_a_written_head_has_all_names_of_tied_weights_for_any_reader(tmp_path: Path) -> None:
    train_model = randomised(made(Tied, "embed"))
    fxcollab.save(train_model, tmp_path / "run")
    for head in range(2):
        write_state_dict(load_head(tmp_path / "run", head), tmp_path / f"{head}.safetensors")
        model = Tied()
        model.load_state_dict(load_file(tmp_path / f"{head}.safetensors"), strict=True)
        tokens = torch.tensor([[0, 5], [2, 3]])
        assert torch.equal(model(tokens), train_model(tokens)[head])
