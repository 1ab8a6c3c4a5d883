"""What each text form of a source names, and how sources are written down and read again."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from torch import nn

from fxcollab.errors import ArtifactError, SourceError
from fxcollab.sources.source import Source, parse_argument, source_of
from tests.sources.helpers import NET, Write, load

# The text forms.


def test_a_path_that_ends_in_py_is_a_file(tmp_path: Path) -> None:
    assert Source.parse("nets/model.py", relative_to=tmp_path) == Source("file", str(tmp_path / "nets" / "model.py"))


def test_a_relative_path_starts_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Source.parse("model.py:Net") == Source("file", str(tmp_path / "model.py"), "Net")


def test_dotted_names_are_a_module_and_an_object() -> None:
    assert Source.parse("package.module:Outer.Inner") == Source("module", "package.module", "Outer.Inner")


def test_the_torchvision_prefix_names_a_model_and_not_a_module() -> None:
    assert Source.parse("torchvision:resnet18") == Source("torchvision", "resnet18")
    assert Source.parse("torchvision.models:resnet18") == Source("module", "torchvision.models", "resnet18")


def test_arguments_are_kept_in_sorted_order() -> None:
    assert Source.parse("m.py", {"b": 1, "a": [2]}).arguments == (("a", [2]), ("b", 1))


@pytest.mark.parametrize("text", ["/nets/model.py", "/nets/model.py:Net", "a.b:net", "torchvision:resnet18"])
def test_str_gives_the_text_form_back(text: str) -> None:
    assert str(Source.parse(text)) == text


@pytest.mark.parametrize("text", ["", "model", "model.py:", "model.py:a-b", "nets/model:Net", ":x", "torchvision:"])
def test_any_other_text_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        Source.parse(text)
    assert str(caught.value) == (
        f"`{text}` is not a source\n  hint: write model.py, model.py:NAME, package.module:NAME, torchvision:NAME, "
        "timm:NAME or hf:NAME_OR_PATH"
    )


def test_a_folder_of_transformers_is_a_path_and_any_other_name_is_one_of_its_hub(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    for text in ("bert", "./bert", str(tmp_path / "bert")):
        source = Source.parse(f"hf:{text}", relative_to=tmp_path)
        assert source == Source("hf", str(tmp_path / "bert"))
        assert source.to_json(tmp_path)["location"] == "./bert"
        assert source.to_json(tmp_path / "run")["location"] == "../bert"
        assert Source.from_json(source.to_json(tmp_path), tmp_path) == source
    named = Source.parse("hf:google/vit-base", relative_to=tmp_path)
    assert named == Source("hf", "google/vit-base")
    assert Source.from_json(named.to_json(tmp_path), tmp_path) == named


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("0.5", 0.5),
        ("true", True),
        ("True", True),
        ("None", None),
        ("[1, 2]", [1, 2]),
        ('"10"', "10"),
        ("relu", "relu"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_an_argument_is_json_or_python_word_or_text(text: str, value: object) -> None:
    assert parse_argument(f"option={text}") == ("option", value)


@pytest.mark.parametrize("text", ["num_classes", "=3", "a b=3"])
def test_an_argument_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_argument(text)
    assert str(caught.value) == (f"`{text}` is not a model argument\n  hint: write NAME=VALUE, as in num_classes=10")


# Written down and read again.


@pytest.mark.parametrize(
    "source",
    [
        Source("torchvision", "resnet18", None, (("num_classes", 10),)),
        Source("module", "package.module", "Net", (("widths", [1, 2]),)),
    ],
)
def test_json_gives_the_source_back(source: Source, tmp_path: Path) -> None:
    assert Source.from_json(json.loads(json.dumps(source.to_json(tmp_path))), tmp_path) == source


def test_a_file_is_stored_relative_to_the_artifact(write: Write, tmp_path: Path) -> None:
    source = Source.parse(f"{write(NET)}:Net")
    data = source.to_json(tmp_path / "runs" / "first")
    assert data == {"kind": "file", "location": "../../model.py", "name": "Net", "arguments": {}}
    assert Source.from_json(data, tmp_path / "runs" / "first") == source
    moved = Source.from_json(data, tmp_path / "elsewhere" / "runs" / "first")
    assert moved.location == str(tmp_path / "elsewhere" / "model.py")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "pickle"},
        {"location": ""},
        {"location": 3},
        {"name": ""},
        {"name": 3},
        {"arguments": []},
        {"kind": "module", "name": None},
    ],
)
def test_damaged_data_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    data = {"kind": "file", "location": "model.py", "name": "Net", "arguments": {}} | change
    with pytest.raises(ArtifactError) as caught:
        Source.from_json(data, tmp_path)
    assert str(caught.value) == (
        "the stored source is damaged\n"
        f"  where: {tmp_path}\n"
        f"  why: it reads {data!r}\n"
        "  hint: transform the model again"
    )


def test_data_that_lacks_a_field_or_is_no_object_is_refused(tmp_path: Path) -> None:
    for data in ({"kind": "file", "location": "model.py"}, None, "model.py"):
        with pytest.raises(ArtifactError, match="the stored source is damaged"):
            Source.from_json(data, tmp_path)


# The source of a Python object.


class Outer:
    class Net(nn.Module):
        pass

    @classmethod
    def make(cls) -> nn.Module:
        return cls.Net()


def make_net() -> nn.Module:
    return nn.Linear(1, 1)


def test_functions_and_classes_of_a_module_have_a_source() -> None:
    assert source_of(make_net) == Source("module", __name__, "make_net")
    assert source_of(Outer.Net) == Source("module", __name__, "Outer.Net")
    assert source_of(Outer.make) == Source("module", __name__, "Outer.make")


def test_a_torchvision_builder_is_an_object_of_its_module() -> None:
    from torchvision.models import resnet50

    assert source_of(resnet50) == Source("module", "torchvision.models.resnet", "resnet50")


def test_what_can_not_be_imported_again_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def local() -> nn.Module:
        return nn.Linear(1, 1)

    original = make_net
    monkeypatch.setattr(sys.modules[__name__], "make_net", local)
    assert [source_of(f) for f in (local, lambda: nn.Linear(1, 1), original, nn.Linear(1, 1))] == [None] * 4


@pytest.mark.parametrize("name", ["__main__", "__mp_main__"])
def test_an_object_of_the_script_is_found_in_its_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = types.ModuleType(name)
    exec("def build_net(): ...", vars(script))
    monkeypatch.setitem(sys.modules, name, script)
    assert source_of(script.build_net) is None
    script.__file__ = str(tmp_path / "train.py")
    assert source_of(script.build_net) == Source("file", str(tmp_path / "train.py"), "build_net")


def test_an_object_of_a_loaded_file_is_found_in_that_file(write: Write) -> None:
    path = write(NET)
    assert source_of(type(load(path).model)) == Source("file", str(path), "Net")
