"""The artifact: what is saved comes back exactly, what is damaged is named, and nothing is left half written."""

from __future__ import annotations

import ast
import copy
import itertools
import json
import os
import pickle
import shutil
import stat
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.errors import ArtifactError, FxCollabError, PatternError, SourceError, StateError
from fxcollab.io import artifact as save_module
from fxcollab.io import folder, plan_file, weights
from fxcollab.io.artifact import load_head
from fxcollab.io.weights import load_state_dict, write_state_dict
from fxcollab.plan import plan_of
from fxcollab.sources.load import load as load_source
from fxcollab.sources.source import Source

PACKAGE = Path(fxcollab.__file__).parent


class Net(nn.Module):
    """Three layers with statistics, for splits at ``a`` and ``b``."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(3, width)
        self.b = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.c = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Tied(nn.Module):
    """An embedding whose weight is the decoder's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 6, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.mix(self.embed(tokens)))


class TwoModes(nn.Module):
    """Returns an auxiliary output in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.aux = nn.Linear(4, 2)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        if self.training:
            return self.c(x), self.aux(x)
        return self.c(x)


class Registered(nn.Module):
    """A root with parameters and buffers of its own, one that no one saves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.a = nn.Linear(3, 4)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.passing) * self.scale


def made(model: Callable[[], nn.Module] | nn.Module = Net, *splits: str, **options: Any) -> Any:
    options.setdefault("seed", 1)
    with seeded(0):
        return fxcollab.transform(model, splits=splits or ("a",), **options)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def randomised(train_model: Any) -> Any:
    """With every value changed, so that nothing comes back by being initialised alike."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in train_model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
    return train_model


def assert_same(one: Any, other: Any, *inputs: Tensor, rounding: float = 0) -> None:
    """Names, order, values, types, plan, code, and outputs in both modes, these up to ``rounding``."""
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
    assert plan_of(one) == plan_of(other)
    assert [graph_code(g) for g in one.modes] == [graph_code(g) for g in other.modes]
    for training in (False, True):
        outputs = [copy.deepcopy(model).train(training)(*inputs) for model in (one, other)]
        torch.testing.assert_close(*outputs, rtol=rounding, atol=0)


def graph_code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(function: Callable[..., Any], *arguments: Any, **options: Any) -> FxCollabError:
    with pytest.raises(FxCollabError) as caught:
        function(*arguments, **options)
    assert isinstance(caught.value, ArtifactError), caught.value
    return caught.value


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return fxcollab.save(made(Net, "a", "b"), tmp_path / "run")


_numbers = itertools.count()

SOURCE = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=4):
            super().__init__()
            self.a = nn.Linear(3, width)
            self.c = nn.Linear(width, 2)

        def forward(self, x):
            return self.c(self.a(x).relu())
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A user's file in a folder of its own."""
    path = tmp_path / "project" / f"model_{next(_numbers)}.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(SOURCE))
    return path


def saved_from(file: Path, directory: Path, **arguments: Any) -> Any:
    loaded = load_source(Source.parse(str(file), arguments))
    train_model = made(loaded.model, factory=loaded.factory, source=loaded.source)
    fxcollab.save(train_model, directory)
    return train_model


# The round trip.


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
    assert (tmp_path / "again/plan.json").read_text() == (saved / "plan.json").read_text()
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
    model.a.weight = nn.Parameter(whole[:12].view(3, 4).t())
    model.c.weight = nn.Parameter(whole[8:16].view(2, 4))
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


# Where the model comes from.


def test_an_importable_factory_is_noted(saved: Path) -> None:
    source = json.loads((saved / "plan.json").read_text())["source"]
    assert source == {"kind": "module", "location": __name__, "name": "Net", "arguments": {}}


def test_a_model_object_needs_the_model_again(tmp_path: Path) -> None:
    train_model = made(Net())
    fxcollab.save(train_model, tmp_path / "run")
    error = refused(fxcollab.load, tmp_path / "run")
    assert error.what == "The plan doesn't say where the model comes from."
    assert error.hint == "give the model: fxcollab.load(directory, model)"
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
    loaded = fxcollab.load(tmp_path / "elsewhere/runs/one")
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
    saved_from(file, tmp_path / "run")
    file.write_text("# a comment\n" + file.read_text() + "\nUNRELATED = 1\n")
    fxcollab.load(tmp_path / "run")


# Damage.


def test_a_folder_without_a_plan_is_no_artifact(tmp_path: Path) -> None:
    assert "it has no plan.json" in str(refused(fxcollab.load, tmp_path).why)
    assert "no such directory" in str(refused(fxcollab.load, tmp_path / "none").why)


@pytest.mark.parametrize(
    "text", [b"", b"not json", b"[1, 2]", b"null", b'{"format": 1', b"\xff\xfe\x00", b"[" * 100_000]
)
def test_a_plan_that_is_no_json_object_is_damaged(saved: Path, text: bytes) -> None:
    (saved / "plan.json").write_bytes(text)
    error = refused(fxcollab.load, saved)
    assert error.what == "The plan is damaged."
    assert error.where == str(saved / "plan.json")


@pytest.mark.parametrize(
    "key",
    [
        *("pattern", "splits", "fanouts", "init", "seed", "rescale"),
        *("granularity", "peers", "inputs", "source", "fingerprint"),
    ],
)
def test_a_plan_without_one_of_its_keys_is_damaged(saved: Path, key: str) -> None:
    _edit_plan(saved, **{key: ...})
    for read in (fxcollab.load, plan_file.read_plan):
        error = refused(read, saved)
        assert error.what == "The plan is damaged."
        assert error.why == f"it has no {key!r}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pattern", 3),
        ("pattern", "spiral"),
        ("pattern", "simple"),
        ("splits", "a,b"),
        ("splits", [1, 2]),
        ("splits", ["a"]),
        ("fanouts", 4),
        ("fanouts", [2, 2.5]),
        ("fanouts", [2, 1]),
        ("fanouts", [2, 2, 2]),
        ("init", None),
        ("seed", "1"),
        ("rescale", "yes"),
        ("granularity", []),
        ("granularity", "fine"),
        ("peers", {}),
        ("inputs", "x"),
        ("inputs", ["x"]),
        ("inputs", [{"name": "x"}]),
        ("inputs", [{"name": "x", "shape": "2x3", "dtype": None}]),
        ("source", "torchvision:resnet18"),
        ("source", {"kind": "url", "location": "x", "name": None, "arguments": {}}),
        ("fingerprint", None),
    ],
)
def test_a_plan_with_a_value_of_a_wrong_kind_is_damaged(saved: Path, key: str, value: object) -> None:
    _edit_plan(saved, **{key: value})
    error = refused(fxcollab.load, saved)
    assert error.what == "The plan is damaged."
    assert error.where == str(saved / "plan.json") and error.why


@pytest.mark.parametrize("number", [2, "1", None, ...])
def test_a_plan_of_another_format_names_it(saved: Path, number: object) -> None:
    _edit_plan(saved, format=number)
    error = refused(fxcollab.load, saved)
    assert error.what == "The plan has another format."
    assert "this version reads 1" in str(error.why)


def _edit_plan(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "plan.json").read_text()) | changes
    (folder / "plan.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def _pickle_it(file: Path) -> None:
    torch.save({"a.weight": torch.zeros(1)}, file)


def _with_metadata(**metadata: str) -> Callable[[Path], None]:
    return lambda file: save_file(load_file(file), file, {f"fxcollab.{key}": v for key, v in metadata.items()})


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _pickle_it,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x00" * 100),
        lambda file: file.write_text("garbage " * 50),
        _with_metadata(order="{"),
        _with_metadata(order="3"),
        _with_metadata(order='["nothing"]'),
        _with_metadata(aliases="[1]"),
    ],
)
def test_damaged_weights_are_named(saved: Path, damage: Callable[[Path], object]) -> None:
    damage(saved / "weights.safetensors")
    error = refused(fxcollab.load, saved)
    assert error.what == "The weights file can't be read."
    assert error.where == str(saved / "weights.safetensors")
    assert error.why


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / "weights.safetensors").unlink()
    error = refused(fxcollab.load, saved)
    assert error.what == "There is no weights file." and error.where == str(saved / "weights.safetensors")


def _without(state: dict[str, Tensor]) -> None:
    del state["peers.b1.c.weight"]


def _reshaped(state: dict[str, Tensor]) -> None:
    state["peers.b1.c.weight"] = torch.zeros(2, 9)


def _with_more(state: dict[str, Tensor]) -> None:
    state["peers.b1.c.gain"] = torch.zeros(1)


@pytest.mark.parametrize("change", [_without, _reshaped, _with_more])
def test_weights_of_other_names_or_shapes_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    folder, model = fxcollab.save(made(Net), tmp_path / "run"), Net()
    before = copy.deepcopy(model.state_dict())
    state = load_state_dict(folder / "weights.safetensors")
    change(state)
    write_state_dict(state, folder / "weights.safetensors", force=True)
    error = refused(fxcollab.load, folder, model)
    assert error.what == "The weights don't fit the plan."
    assert "peers.b1.c." in str(error.where)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Where it may be written.


def test_an_existing_directory_is_refused(saved: Path) -> None:
    before = content(saved)
    error = refused(fxcollab.save, made(Net), saved)
    assert error.what == "The output directory exists." and "force" in str(error.hint)
    assert content(saved) == before


def test_force_replaces_an_artifact(saved: Path) -> None:
    train_model = randomised(made(Net, "b"))
    fxcollab.save(train_model, saved, force=True)
    assert_same(train_model, fxcollab.load(saved), floats(5, 3))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_force_replaces_nothing_but_an_artifact(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("dear")
    (tmp_path / "notes.txt").write_text("dear")
    (saved / "epoch9.pt").write_text("dear")
    for target, why in (
        (tmp_path / "photos", "it has no plan.json"),
        (tmp_path / "notes.txt", "it is a file"),
        (saved, "epoch9.pt would be lost"),
    ):
        error = refused(fxcollab.save, made(Net), target, force=True)
        assert "is not replaced" in error.what and error.why == why
    assert (saved / "epoch9.pt").read_text() == (tmp_path / "photos/one.jpg").read_text() == "dear"


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    assert fxcollab.save(made(Net), tmp_path / "a/b/run") == tmp_path / "a/b/run"
    assert fxcollab.load(tmp_path / "a/b/run")


def test_force_through_a_link_replaces_what_it_points_at(saved: Path) -> None:
    link = saved.with_name("latest")
    link.symlink_to(saved, target_is_directory=True)
    train_model = made(Net, "b")
    fxcollab.save(train_model, link, force=True)
    assert link.is_symlink()
    assert list(fxcollab.load(saved).state_dict()) == list(train_model.state_dict())


# All or nothing.


STEPS = (
    (save_module, "save_state_dict"),
    (save_module, "_readable_code"),
    (save_module, "plan_to_json"),
    (plan_file, "fingerprint"),
    (folder, "_swap"),
)


@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_directory_or_none(
    saved: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str, error: BaseException
) -> None:
    before, train_model = content(saved), made(Net)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, step, fail)
    for target, force in ((saved, True), (saved.with_name("new"), False)):
        with pytest.raises(type(error)):
            fxcollab.save(train_model, target, force=force)
    assert content(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_swap_that_fails_halfway_puts_the_old_directory_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, train_model = content(saved), made(Net)
    replace, calls = Path.replace, []

    def fail_the_second_time(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError("the network drive is gone")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_the_second_time)
    with pytest.raises(OSError, match="network drive"):
        fxcollab.save(train_model, saved, force=True)
    assert content(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_write_of_a_state_dict_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "head.safetensors"
    write_state_dict({"w": torch.ones(2)}, file)

    def fail(unique: object, draft: Path, *_: object) -> None:
        Path(draft).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        write_state_dict({"w": torch.zeros(2)}, file, force=True)
    assert torch.equal(load_file(file)["w"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [file]


def test_state_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = Net()
    model.b = Noted(4, 4)
    error = refused(fxcollab.save, made(model), tmp_path / "run")
    assert error.what == "State 'b._extra_state' is a dict, not a tensor." and "pickle" in str(error.why)
    assert not list(tmp_path.iterdir())


class Noted(nn.Linear):
    """Saves more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}

    def set_extra_state(self, state: object) -> None: ...


def test_tensors_that_safetensors_does_not_know_are_refused(tmp_path: Path) -> None:
    error = refused(write_state_dict, {"w": torch.eye(2).to_sparse()}, tmp_path / "w.safetensors")
    assert error.what == "State 'w' is a torch.sparse_coo tensor."
    assert not list(tmp_path.iterdir())


# One head without the model.


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


# No pickle, and ordinary files.


def test_nothing_in_the_folder_can_be_unpickled(saved: Path) -> None:
    files = sorted(saved.iterdir())
    assert [file.name for file in files] == ["diff.html", "graph.py", "plan.json", "weights.safetensors"]
    for file in files:
        with pytest.raises(Exception, match=r".*"), file.open("rb") as opened:
            pickle.load(opened)
        assert b"pickle" not in file.read_bytes() and not zipfile.is_zipfile(file)


def test_the_library_never_pickles() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {name}"
        for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "cli").rglob("*.py")])
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _pickling(node)
    ]
    assert not found


def _pickling(node: ast.AST) -> list[str]:
    """Imports of pickling modules, and calls or mentions of torch's own."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Attribute):
        names = [ast.unparse(node)]
    else:
        return []
    roots = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    return [n for n in names if n.split(".")[0] in roots or n in ("torch.save", "torch.load", "torch.package")]


def test_the_scan_for_pickling_finds_what_it_looks_for() -> None:
    for text in ("import pickle", "from pickle import loads", "torch.load('x')", "from torch import save"):
        assert any(_pickling(node) for node in ast.walk(ast.parse(text))), text


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    train_model, old = made(Net), os.umask(mask)
    try:
        fxcollab.save(train_model, tmp_path / "run")
        fxcollab.save(train_model, tmp_path / "run", force=True)
        write_state_dict(load_head(tmp_path / "run"), tmp_path / "head.safetensors")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*tmp_path.rglob("*"),)}
    assert modes.pop("run") == 0o777 & ~mask
    assert set(modes) == {"diff.html", "graph.py", "plan.json", "weights.safetensors", "head.safetensors"}
    assert set(modes.values()) == {0o666 & ~mask}


def test_this_module_is_importable_by_the_name_that_plans_note() -> None:
    assert sys.modules[__name__].Net is Net


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
