"""Models of installed modules, torchvision, timm and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.sources.helpers import Write, load, refusal

# Modules.


def test_a_module_is_imported_from_the_current_directory(package: str) -> None:
    before = list(sys.path)
    loaded = load(f"{package}.nets:Net", width=8)
    assert loaded.model.linear.in_features == 8
    assert loaded.factory is not None
    assert loaded.factory() is not loaded.model
    assert sys.path == before


def test_an_instance_in_a_module_has_no_factory(package: str) -> None:
    loaded = load(f"{package}.nets:net")
    assert loaded.model is sys.modules[f"{package}.nets"].net
    assert loaded.factory is None


def test_an_unknown_module_gets_close_matches(package: str) -> None:
    assert str(refusal(f"{package}.netz:Net")) == (
        f"there is no module `{package}.netz`\n  hint: did you mean {package}.nets?"
    )
    assert str(refusal(f"{package}x.nets:Net").hint).startswith(f"did you mean {package}")
    assert refusal("zzqqkkjjxx:Net").hint == "run this in the folder that holds it, or set PYTHONPATH"


def test_a_module_that_raises_is_shown_at_its_line(package: str, write: Write) -> None:
    path = write("import math\nmath.sqrt(-1)\n", name=f"{package}/broken.py")
    assert str(refusal(f"{package}.broken:Net")) == (
        f"`{package}.broken` can't be imported\n  where: {path}:2\n  why: ValueError: math domain error"
    )


def test_a_module_that_misses_an_import_of_its_own_exists(package: str, write: Write) -> None:
    path = write("import no_such_library\n", name=f"{package}/broken.py")
    error = refusal(f"{package}.broken:Net")
    assert (error.what, error.where) == (f"`{package}.broken` can't be imported", f"{path}:1")


def test_an_unknown_name_in_a_module_gets_close_matches(package: str) -> None:
    error = refusal(f"{package}.nets:Nett")
    assert error.what == f"`{package}.nets` has no `Nett`"
    assert error.hint == "did you mean Net, net?"


# torchvision.


def test_a_torchvision_model_is_built_without_weights() -> None:
    loaded = load("torchvision:resnet18", num_classes=7)
    assert loaded.model.fc.out_features == 7
    assert (loaded.source.name, loaded.factory is None) == (None, False)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "deeplabv3_mobilenet_v3_large"])
def test_building_neither_warns_nor_downloads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("download"))
    monkeypatch.setattr("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor)  # slow
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        load(f"torchvision:{name}")


def test_pretrained_weights_give_no_fresh_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    weights = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: weights)
    loaded = load("torchvision:resnet18", weights="DEFAULT")
    assert torch.equal(loaded.model.conv1.weight, weights["conv1.weight"])
    assert loaded.factory is None


def test_an_unknown_torchvision_model_gets_close_matches() -> None:
    error = refusal("torchvision:resnet51")
    assert error.what == "torchvision has no model `resnet51`"
    assert error.hint is not None
    assert "did you mean resnet" in error.hint
    assert refusal("torchvision:qqqq").hint == "torchvision.models.list_models() lists them"


def test_an_argument_that_a_torchvision_model_does_not_take_is_refused() -> None:
    error = refusal("torchvision:resnet18", num_clases=3)
    assert error.what == "`torchvision:resnet18` failed to build its model"
    assert "num_clases" in str(error.why)


@pytest.mark.slow
def test_libraries_are_imported_by_their_sources_alone() -> None:
    libraries = "{'torchvision', 'timm', 'transformers'}"
    code = f"import sys, fxcollab.sources.load; sys.exit(bool({libraries} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# timm and transformers.


def test_a_timm_model_has_random_weights_and_a_factory() -> None:
    loaded = load("timm:resnet18", num_classes=7)
    assert loaded.model.fc.out_features == 7
    assert loaded.factory is not None
    assert not torch.equal(loaded.factory().fc.weight, loaded.model.fc.weight)


def test_an_unknown_timm_model_gets_close_matches() -> None:
    error = refusal("timm:resnet51")
    assert error.what == "timm has no model `resnet51`"
    assert "did you mean resnet" in str(error.hint)


def test_an_argument_that_a_timm_model_does_not_take_is_refused() -> None:
    assert "num_clases" in str(refusal("timm:resnet18", num_clases=3).why)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as transformers saves it."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    folder = tmp_path_factory.mktemp("models") / "bert"
    BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(folder)
    return folder


def test_a_saved_model_of_transformers_has_its_weights_and_new_ones_have_random_ones(bert: Path) -> None:
    first, second = load(f"hf:{bert}"), load(f"hf:{bert}")
    assert type(first.model).__name__ == "BertForSequenceClassification"
    assert torch.equal(first.model.classifier.weight, second.model.classifier.weight)
    assert first.factory is not None
    assert not torch.equal(first.factory().classifier.weight, first.model.classifier.weight)
    assert first.model.training


def test_a_saved_model_of_transformers_may_be_built_anew_and_as_another_class(bert: Path) -> None:
    loaded = load(f"hf:{bert}", pretrained=False, architecture="BertForTokenClassification", num_labels=5)
    assert type(loaded.model).__name__ == "BertForTokenClassification"
    assert loaded.model.classifier.out_features == 5


@pytest.mark.parametrize("architecture", ["AutoModelForCTC", "AutoProcessor"])
def test_code_in_a_folder_of_transformers_is_neither_run_nor_asked_for(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    remote = {architecture: "evil.Model"}
    config = {"model_type": "bert", "architectures": [architecture], "auto_map": remote}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"auto_map": remote}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    for pretrained in (True, False):
        assert refusal(f"hf:{tmp_path}", pretrained=pretrained).why
    assert not (tmp_path / "ran").exists()


def test_what_transformers_does_not_know_is_refused(bert: Path, tmp_path: Path) -> None:
    assert "BertForNothing" in refusal(f"hf:{bert}", architecture="BertForNothing").what
    assert "doesn't take num_lables" in refusal(f"hf:{bert}", num_lables=3).what
    assert refusal(f"hf:{tmp_path}").why


def test_pickled_weights_of_transformers_are_not_read(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    torch.save(load(f"hf:{bert}").model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "safetensors" in str(refusal(f"hf:{tmp_path}").why)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_library_that_is_not_installed_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    error = refusal(f"{'hf' if library == 'transformers' else library}:resnet18")
    assert error.what == f"{library} can't be imported"
    assert error.hint == f"pip install {library}"
