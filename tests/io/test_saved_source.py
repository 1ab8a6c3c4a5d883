"""Where a saved model's original comes from, and changes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcollab
from fxcollab.errors import SourceError
from fxcollab.sources.load import load as load_source
from fxcollab.sources.source import Source
from tests.io.helpers import Net, assert_same, floats, made, refused, saved_from


def test_an_importable_factory_is_noted(saved: Path) -> None:
    source = json.loads((saved / "plan.json").read_text())["source"]
    assert source == {"kind": "module", "location": Net.__module__, "name": "Net", "arguments": {}}


def test_a_model_object_needs_the_model_again(tmp_path: Path) -> None:
    train_model = made(Net())
    fxcollab.save(train_model, tmp_path / "run")
    error = refused(fxcollab.load, tmp_path / "run")
    assert error.what == "The plan doesn't say where the model comes from."
    assert error.hint is not None and "give the model: fxcollab.load(directory, model)" in error.hint
    for given in (Net(), Net, lambda: Net()):
        assert_same(train_model, fxcollab.load(tmp_path / "run", given), floats(5, 3))


def test_a_file_and_its_arguments_are_noted(file: Path, tmp_path: Path) -> None:
    train_model = saved_from(file, tmp_path / "run", width=6)
    loaded = fxcollab.load(tmp_path / "run")
    assert loaded.a.out_features == 6
    assert_same(train_model, loaded, floats(5, 3))


def test_a_file_and_its_folder_may_move_together(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_model = saved_from(file, file.parent / "runs/one")
    shutil.move(file.parent, tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    error = refused(fxcollab.load, tmp_path / "elsewhere/runs/one")  # what lies beside it may be another's
    assert str(tmp_path / "elsewhere" / file.name) in str(error.why) and "trust_source=True" in str(error.hint)
    loaded = fxcollab.load(tmp_path / "elsewhere/runs/one", trust_source=True)
    assert torch.equal(loaded.a.weight, train_model.a.weight)
    assert "project" not in (tmp_path / "elsewhere/runs/one/plan.json").read_text()


def test_a_folder_that_moved_away_from_its_file_says_what_is_missing(file: Path, tmp_path: Path) -> None:
    saved_from(file, file.parent / "runs/one")
    shutil.move(file.parent / "runs", tmp_path / "runs")
    with pytest.raises(SourceError, match=f"there is no file {file.name}"):
        fxcollab.load(tmp_path / "runs/one")
    assert fxcollab.load(tmp_path / "runs/one", load_source(Source.parse(str(file))).model)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((".relu()", ".tanh()"), "fingerprints differ"),
        (("self.a(x)", "self.a(x + 1)"), "fingerprints differ"),
        (("self.a", "self.z"), "There is no module and no node named 'a'."),
    ],
)
def test_a_source_that_changed_is_noticed(file: Path, tmp_path: Path, change: tuple[str, str], why: str) -> None:
    saved_from(file, tmp_path / "run")
    file.write_text(file.read_text().replace(*change))
    error = refused(fxcollab.load, tmp_path / "run")
    assert error.what == "The source no longer makes the graph that was saved."
    assert why in str(error.why)
    assert str(file) in str(error.where)


def test_a_source_that_changed_its_sizes_is_noticed(file: Path, tmp_path: Path) -> None:
    saved_from(file, tmp_path / "run")
    file.write_text(file.read_text().replace("width=4", "width=5"))
    error = refused(fxcollab.load, tmp_path / "run")
    assert error.what == "The weights don't fit the plan."
    assert "a.weight" in str(error.where) and "has the source changed" in str(error.hint)


def test_another_given_model_is_noticed(saved: Path) -> None:
    error = refused(fxcollab.load, saved, nn.Sequential(nn.Linear(3, 2)))
    assert error.what == "The source no longer makes the graph that was saved."
    assert "the given model" in str(error.where)


def test_a_change_that_leaves_the_graph_alone_is_none(file: Path, tmp_path: Path) -> None:
    train_model = saved_from(file, tmp_path / "run")
    file.write_text("# a comment\n" + file.read_text() + "\nUNRELATED = 1\n")
    assert_same(train_model, fxcollab.load(tmp_path / "run"), floats(5, 3))


SCRIPT = """
import torch
from torch import nn
import fxcollab

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(3, 4), nn.Linear(4, 2)
    def forward(self, x):
        return self.c(self.a(x))

open("runs", "a").write("begun ")
model = fxcollab.{call}
open("runs", "a").write("trained ")
"""


@pytest.mark.parametrize(
    "call", ["transform(Net, splits='a')", "load('run')", "save(nn.Linear(1, 1), 'run', force=True)"]
)
def test_a_script_that_would_train_again_is_refused_before_it_does(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script, guarded = tmp_path / "train.py", "if __name__ == '__main__':\n    model = fxcollab"
    script.write_text(SCRIPT.replace("model = fxcollab", guarded).format(call=call))  # the hint
    saved_from(script, tmp_path / "run")
    content = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    fxcollab.load(tmp_path / "run")
    (tmp_path / "runs").unlink()
    script.write_text(SCRIPT.format(call=call))
    with pytest.raises(SourceError) as caught:
        fxcollab.load(tmp_path / "run")
    error = caught.value
    assert "train.py calls fxcollab." in error.what and "if __name__ == '__main__':" in str(error.hint)
    assert (tmp_path / "runs").read_text() == "begun "
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == content


def test_a_given_model_is_what_is_noted_from_then_on(saved: Path, tmp_path: Path) -> None:
    fxcollab.save(fxcollab.load(saved, Net()), tmp_path / "again")
    assert refused(fxcollab.load, tmp_path / "again").what == "The plan doesn't say where the model comes from."


@pytest.mark.slow
def test_a_model_with_compiled_parts_is_loaded(tmp_path: Path) -> None:
    def compiled() -> nn.Module:
        model = Net()
        model.c = torch.compile(model.c, backend="eager")
        return model

    train_model = made(compiled())
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run", compiled)
    for name, value in train_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
