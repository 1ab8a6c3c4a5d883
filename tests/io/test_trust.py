"""Whose code is run: the account's own unasked, a stranger's only on request."""

from __future__ import annotations

import importlib
import json
import shutil
import stat
import sys
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxcollab
from fxcollab.errors import ArtifactError, DamagedError, MixedError, TrustError
from fxcollab.io import artifact
from fxcollab.io.artifact import load_head
from fxcollab.io.recognise import checksum_of
from fxcollab.sources.load import load as load_source
from fxcollab.sources.source import Source
from tests.io.helpers import Net, made, saved_from


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An account of this test alone: the folder of its key."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "fxcollab"


def with_source(folder: Path, **source: Any) -> None:
    data = json.loads((folder / "plan.json").read_text())
    data["source"] = {"kind": "module", "location": "os", "name": "system", "arguments": {}} | source
    (folder / "plan.json").write_text(json.dumps(data))


def test_the_key_is_this_accounts_alone(account: Path, file: Path, tmp_path: Path) -> None:
    saved_from(file, tmp_path / "run")
    key = account / "key"
    assert [path.name for path in account.iterdir()] == ["key"] and len(key.read_bytes()) == 32
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and stat.S_IMODE(account.stat().st_mode) == 0o700
    assert fxcollab.load(tmp_path / "run")
    key.chmod(0o644)  # others may have read it
    with pytest.raises(TrustError):
        fxcollab.load(tmp_path / "run")


def test_another_accounts_plan_is_loaded_on_request_and_its_head_unasked(
    account: Path, file: Path, tmp_path: Path
) -> None:
    saved_from(file, tmp_path / "run", width=6)
    shutil.rmtree(account)
    with pytest.raises(TrustError) as caught:
        fxcollab.load(tmp_path / "run")
    assert f"execute {file}" in str(caught.value.why) and "width=6" in str(caught.value.why)
    assert "trust_source=True (--trust-source)" in str(caught.value.hint)
    assert not account.exists(), "asking makes no key"
    assert fxcollab.load(tmp_path / "run", trust_source=True).a.out_features == 6
    assert fxcollab.load(tmp_path / "run", load_source(Source.parse(str(file), {"width": 6})).model)
    assert load_head(tmp_path / "run", 1)


@pytest.mark.parametrize(
    "source",
    [
        {"arguments": {"command": "touch RAN"}},
        {"kind": "file", "location": "../stranger.py", "name": None},
        {"kind": "timm", "location": "resnet18", "name": None, "arguments": {"checkpoint_path": "x.pt"}},
        {"kind": "hf", "location": "./model", "name": None},
        {"location": "torchvision", "name": "resnet18"},
        {"location": "builtins", "name": "exec", "arguments": {"source": "open('RAN', 'w')"}},
    ],
)
def test_a_plan_whose_source_was_changed_runs_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any]
) -> None:
    monkeypatch.chdir(saved.parent)
    (saved.parent / "stranger.py").write_text("open('RAN', 'w')")
    with_source(saved, **source)
    with pytest.raises(TrustError):
        fxcollab.load(saved)
    assert not (saved.parent / "RAN").exists()
    assert fxcollab.load(saved, Net)


def test_an_own_plan_beside_other_code_is_a_strangers(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive may hold a plan that one has published, and a module of the name that it names."""
    saved_from(file, file.parent / "run")
    shutil.copytree(file.parent, tmp_path / "archive")
    (tmp_path / "archive" / file.name).write_text("raise AssertionError('it ran')")
    with pytest.raises(TrustError):
        fxcollab.load(tmp_path / "archive" / "run")
    package = tmp_path / "own" / "package_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(file, package / "nets.py")
    monkeypatch.chdir(package.parent)
    loaded = load_source(Source.parse("package_of_a_test.nets:Net"))
    fxcollab.save(made(loaded.model, source=loaded.source, factory=loaded.factory), "run")
    assert fxcollab.load("run")
    shutil.copytree(package.parent, tmp_path / "copy")
    for name in ("package_of_a_test", "package_of_a_test.nets"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path / "copy")
    with pytest.raises(TrustError):
        fxcollab.load("run")


def test_a_file_that_is_not_there_is_told_as_such(saved: Path) -> None:
    with_source(saved, kind="file", location="no.py")
    with pytest.raises(fxcollab.SourceError, match="there is no file"):
        fxcollab.load(saved)
    with_source(saved, location="no_such_package.nets", name="Net")
    with pytest.raises(TrustError, match="import no_such_package"):  # it may be found by other ways than in folders
        fxcollab.load(saved)


def test_looking_for_a_strangers_module_runs_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finders that packages add may import others to answer, such as that of setuptools for ``distutils``."""

    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.startswith("stranger"):
                (tmp_path / "RAN").write_text("")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with_source(saved, location="strangers_package.nets", name="Net")
    with pytest.raises(TrustError):
        fxcollab.load(saved)
    assert not (tmp_path / "RAN").exists()


class TakesMore(Net):
    def forward(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("name", ["y=open('RAN', 'w')", "a b", "", "self", "lambda", "x:open('RAN', 'w')"])
@pytest.mark.parametrize("where", ["inputs", "fixed"])
def test_names_of_inputs_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    fxcollab.save(fxcollab.transform(TakesMore(), splits=["a"], init="copy-anyway"), "run")
    data = json.loads(Path("run/plan.json").read_text())
    if where == "inputs":
        data["inputs"].append({"name": name, "shape": None, "dtype": None})
    else:
        data["fixed"] = {name: 1}
    Path("run/plan.json").write_text(json.dumps(data | {"checksum": checksum_of(data)}))
    with pytest.raises(DamagedError, match="generated forward has a parameter of that name"):
        fxcollab.load("run", TakesMore())
    with pytest.raises(fxcollab.CaptureError, match="input can't be called"):
        fxcollab.transform(TakesMore(), splits=["a"], example_inputs={"x": torch.zeros(2, 3), name: 1})
    assert not Path("RAN").exists()


@pytest.mark.parametrize("lie", ["no tensors", "tensors in one place", "more heads", "no peers"])
def test_a_library_models_tree_is_built_only_where_the_weights_have_it(
    account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    loaded = load_source(Source.parse("timm:test_resnet"))
    train_model = fxcollab.transform(loaded.model, splits=["layer1"], source=loaded.source, init="copy-anyway")
    fxcollab.save(train_model, tmp_path / "run")
    shutil.rmtree(account, ignore_errors=True)
    assert fxcollab.load(tmp_path / "run")
    weights = tmp_path / "run" / "weights.safetensors"
    data = json.loads((tmp_path / "run" / "plan.json").read_text())
    if lie == "no tensors":
        content = weights.read_bytes()
        weights.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    elif lie == "tensors in one place":
        content = weights.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header = {k: v if k == "__metadata__" else v | {"data_offsets": [0, 4]} for k, v in header.items()}
        text = json.dumps(header).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    elif lie == "no peers":
        save_file({k: v for k, v in load_file(weights).items() if not k.startswith("peers.")}, weights)
    else:
        data["fanouts"] = [4096]
        (tmp_path / "run" / "plan.json").write_text(json.dumps(data | {"checksum": checksum_of(data)}))
    monkeypatch.setattr(artifact, "load_source", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ArtifactError, match=r"can't be read|another head tree"):
        fxcollab.load(tmp_path / "run")


def test_what_is_made_of_a_given_model_does_not_name_a_strangers_code(saved: Path, tmp_path: Path) -> None:
    with_source(saved, kind="file", location=str(tmp_path / "stranger.py"))
    (tmp_path / "stranger.py").write_text("raise AssertionError('it ran')")
    for given, location in ((Net(), None), (Net, Net.__module__)):
        fxcollab.save(fxcollab.load(saved, given), tmp_path / "mine", force=True)
        source = json.loads((tmp_path / "mine/plan.json").read_text())["source"]
        assert source == (location and {"kind": "module", "location": location, "name": "Net", "arguments": {}})


def test_a_module_elsewhere_does_not_find_packages_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/helper_of_a_test.py").write_text("raise AssertionError('it ran')")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/nets_of_a_test.py").write_text("import helper_of_a_test")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    with pytest.raises(fxcollab.SourceError, match="No module named 'helper_of_a_test'"):
        load_source(Source.parse("nets_of_a_test:Net"))


def test_names_of_libraries_need_no_trust_and_their_arguments_do(account: Path, tmp_path: Path) -> None:
    for name, arguments in (("plain", {}), ("other", {"num_classes": 2})):
        loaded = load_source(Source.parse("torchvision:shufflenet_v2_x0_5", arguments))
        fxcollab.save(made(loaded.model, "stage4", source=loaded.source), tmp_path / name)
        assert fxcollab.load(tmp_path / name)
    shutil.rmtree(account)
    assert fxcollab.load(tmp_path / "plain")
    with pytest.raises(TrustError, match="num_classes=2"):
        fxcollab.load(tmp_path / "other")
    assert fxcollab.load(tmp_path / "other", trust_source=True)


def test_a_strangers_model_is_built_only_where_the_weights_are_of_it(
    account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_source(Source.parse("torchvision:shufflenet_v2_x0_5"))
    fxcollab.save(made(loaded.model, "stage4", source=loaded.source), tmp_path / "run")
    with_source(tmp_path / "run", kind="torchvision", location="vit_h_14", name=None)

    def built(source: Source) -> Any:
        raise AssertionError(f"{source} was built")

    monkeypatch.setattr(artifact, "load_source", built)
    with pytest.raises(MixedError, match="not those of the model that the plan names"):
        fxcollab.load(tmp_path / "run")
    with_source(tmp_path / "run", kind="torchvision", location="shufflenet_v2_x0_5", name=None)
    shutil.rmtree(account)
    weights = tmp_path / "run/weights.safetensors"
    state = load_file(weights)
    one, other = "stage2.1.branch2.1.weight", "stage2.1.branch2.1.bias"
    del state[other]
    save_file(state, weights, {"fxcollab.aliases": json.dumps({other: one})})
    with pytest.raises(MixedError, match="stored as one with others"):
        fxcollab.load(tmp_path / "run")
    weights.unlink()
    with pytest.raises(MixedError):
        fxcollab.load(tmp_path / "run")


def test_a_strangers_fixed_inputs_need_trust(account: Path, tmp_path: Path) -> None:
    loaded = load_source(Source.parse("torchvision:shufflenet_v2_x0_5"))
    fxcollab.save(made(loaded.model, "stage4", source=loaded.source), tmp_path / "run")
    with_source(tmp_path / "run", kind="torchvision", location="shufflenet_v2_x0_5", name=None)
    plan = tmp_path / "run/plan.json"
    data = json.loads(plan.read_text()) | {"fixed": {"times": 10**9}}
    plan.write_text(json.dumps({key: value for key, value in data.items() if key != "checksum"}))
    with pytest.raises(TrustError):
        fxcollab.load(tmp_path / "run")


@pytest.mark.slow
def test_names_of_libraries_are_those_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's folder may have a package of such a name in it, where one stands when loading."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise AssertionError('it ran')")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    before = list(sys.path)
    assert load_source(Source.parse("timm:resnet10t")).model and sys.path == before


def test_trust_in_remote_code_is_never_stored(tmp_path: Path, saved: Path) -> None:
    source = Source("hf", "some/model", None, (("num_labels", 2), ("trust_remote_code", True)))
    fxcollab.save(made(Net, source=source), tmp_path / "hf")
    assert json.loads((tmp_path / "hf/plan.json").read_text())["source"]["arguments"] == {"num_labels": 2}
    with_source(saved, kind="hf", location="a/b", name=None, arguments={"trust_remote_code": True})
    with pytest.raises(fxcollab.FxCollabError, match="damaged"):
        fxcollab.load(saved, trust_source=True)


def test_without_a_place_for_the_key_the_plan_is_saved_unsigned_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.warns(UserWarning, match="trust_source=True"):
        fxcollab.save(made(Net), tmp_path / "run")


def test_an_own_plan_of_a_package_that_is_edited_where_it_lies_is_ones_own(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a package is found by a finder of its own, as setuptools installs it."""
    package = tmp_path / "src" / "edited_package_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(file, package / "nets.py")

    class Finder:
        def find_spec(self, name: str, *_: Any) -> Any:
            if name == package.name:
                return spec_from_file_location(
                    name, package / "__init__.py", submodule_search_locations=[str(package)]
                )
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    loaded = load_source(Source.parse(f"{package.name}.nets:Net"))
    fxcollab.save(made(loaded.model, source=loaded.source, factory=loaded.factory), tmp_path / "run")
    for name in (package.name, f"{package.name}.nets"):
        monkeypatch.delitem(sys.modules, name)
    assert fxcollab.load(tmp_path / "run")
    with_source(tmp_path / "run", location=f"{package.name}.nets", name="TakesMore")
    with pytest.raises(TrustError):
        fxcollab.load(tmp_path / "run")


def test_what_would_run_is_shown_however_long_its_names_are(saved: Path) -> None:
    folder = f"{'models-' * 30}/{'baseline-' * 25}"
    (saved / folder).mkdir(parents=True)
    (saved / folder / "evil.py").write_text("")
    with_source(saved, kind="file", location=f"{folder}/evil.py", name="build_model")
    with pytest.raises(TrustError, match=r" \.\.\. .*/evil\.py:build_model"):
        fxcollab.load(saved)
    with_source(
        saved, location="torch.utils.model_zoo", name="load_url", arguments={"a": "x" * 400, "url": "http://it"}
    )
    with pytest.raises(TrustError, match=r"load_url, with arguments \(a='xx.* \.\.\. .*xx', url='http://it'\)"):
        fxcollab.load(saved)


def test_a_module_that_is_not_found_from_here_is_told_as_such(
    tmp_path: Path, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "work"
    (own / "inner").mkdir(parents=True)
    (own / "nowhere_else.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))\n"
    )
    monkeypatch.syspath_prepend(own)
    module = importlib.import_module("nowhere_else")
    fxcollab.save(fxcollab.transform(module.build, splits=["0"], seed=0), own / "plan")
    fxcollab.load(own / "plan")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(own)])
    monkeypatch.delitem(sys.modules, "nowhere_else")
    monkeypatch.chdir(own / "inner")
    with pytest.raises(TrustError, match=r"(?s)is in no folder of sys.path.*set PYTHONPATH"):
        fxcollab.load("../plan")
