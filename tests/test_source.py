"""Sources: what each text form names, what a bare file gives, and what every refusal says."""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fxcollab.errors import ArtifactError, SourceError
from fxcollab.sources.load import load as load_source
from fxcollab.sources.loaded import Loaded
from fxcollab.sources.source import Source, parse_argument, source_of

Write = Callable[..., Path]

NET = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=3):
            super().__init__()
            self.linear = nn.Linear(width, 2)
"""
BLOCK = """
    class Block(nn.Module):
        def __init__(self, channels, stride):
            super().__init__()
            self.linear = nn.Linear(channels, stride)
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files of one folder; each text may come in indented parts."""

    def write_file(*parts: str, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(textwrap.dedent(part) for part in parts))
        return path

    return write_file


@pytest.fixture
def package(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serial: str) -> str:
    """A package in the current directory, under a name that no other test imports."""
    write(NET, "net = Net()\n", name=f"{serial}/nets.py")
    write("", name=f"{serial}/__init__.py")
    monkeypatch.chdir(tmp_path)
    return serial


_numbers = itertools.count()


@pytest.fixture
def serial() -> str:
    return f"source_case_{next(_numbers)}"


def load(text: object, **arguments: object) -> Loaded:
    return load_source(Source.parse(str(text), arguments))  # type: ignore[arg-type]


def refusal(text: object, **arguments: object) -> SourceError:
    path = list(sys.path)
    with pytest.raises(SourceError) as caught:
        load(text, **arguments)
    assert sys.path == path
    return caught.value


def line_of(path: Path, text: str) -> str:
    number = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)
    return f"{path}:{number}"


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


# What a bare file gives.


def test_model_comes_first(write: Write) -> None:
    loaded = load(write(NET, "other = Net()\nmodel = Net(5)\ndef build_model(): return Net(7)\n"))
    assert (loaded.source.name, loaded.model.linear.in_features) == ("model", 5)


@pytest.mark.parametrize("line", ["model = Net", "def model(): return Net()"])
def test_model_may_be_a_class_or_a_function(write: Write, line: str) -> None:
    loaded = load(write(NET, line))
    assert loaded.source.name == "model"
    assert type(loaded.model).__name__ == "Net"


@pytest.mark.parametrize("name", ["build_model", "get_model", "create_model", "make_model"])
def test_then_come_the_usual_names_of_builders(write: Write, name: str) -> None:
    loaded = load(write(NET, f"import types as model\nnet = Net()\ndef {name}(): return Net(7)\n"))
    assert (loaded.source.name, loaded.model.linear.in_features) == (name, 7)


def test_then_the_one_instance_comes_before_its_class(write: Write) -> None:
    loaded = load(write(NET, "net = Net(5)\nalias = net\n"))
    assert loaded.model.linear.in_features == 5


def test_a_loss_at_the_top_level_is_not_taken_for_the_model(write: Write) -> None:
    assert load(write(NET, "criterion = nn.CrossEntropyLoss()\n")).source.name == "Net"


def test_then_the_one_class_that_needs_no_argument(write: Write) -> None:
    assert load(write(NET, BLOCK)).source.name == "Net"


def test_arguments_decide_which_class_can_be_built(write: Write) -> None:
    loaded = load(write("from torch import nn\n", BLOCK), channels=3, stride=2)
    assert (loaded.source.name, loaded.model.linear.in_features) == ("Block", 3)


def test_imported_and_abstract_classes_do_not_count(write: Write) -> None:
    base = """
        import abc
        from torch.nn import Identity, ReLU
        class Base(nn.Module, abc.ABC):
            @abc.abstractmethod
            def depth(self): ...
    """
    assert load(write(NET, base)).source.name == "Net"


def test_several_models_are_listed(write: Write) -> None:
    path = write(NET, BLOCK, "a, b = Net(), Net()\ndef make(depth): return Net()\nWIDTH = 3\n")
    assert str(refusal(path)) == (
        "model.py defines several models\n"
        f"  where: {path}\n"
        "  why: it has Net (module class), Block (module class, needs channels, stride),"
        " a (instance of Net), b (instance of Net), make (function, needs depth)\n"
        "  hint: name the one you mean, as in model.py:a, or call it `model`"
    )


def test_a_file_without_a_model_says_what_it_has(write: Write) -> None:
    path = write("import torch\nfrom torch.nn import Linear\nclass Config: ...\nmodel = None\n")
    assert str(refusal(path)) == (
        "model.py defines no model\n"
        f"  where: {path}\n"
        "  why: it has Config (class)\n"
        "  hint: name the one you mean, as in model.py:NAME, or call it `model`"
    )


def test_an_empty_file_has_nothing(write: Write) -> None:
    assert refusal(write("")).why == "it has neither a module nor a class nor a function"


# A name in a file.


def test_a_name_picks_an_object(write: Write) -> None:
    path = write(NET, BLOCK, "model = Net()\nclass Zoo:\n    Small = Net\n")
    assert type(load(f"{path}:Block", channels=4, stride=1).model).__name__ == "Block"
    assert load(f"{path}:Zoo.Small", width=9).model.linear.in_features == 9
    assert isinstance(load(f"{path}:model.linear").model, nn.Linear)


def test_an_unknown_name_gets_close_matches(write: Write) -> None:
    path = write(NET)
    assert str(refusal(f"{path}:Nett")) == (f"`model.py` has no `Nett`\n  where: {path}\n  hint: did you mean Net?")


def test_something_else_than_a_model_is_refused(write: Write) -> None:
    path = write("CONFIG = {}\n")
    assert str(refusal(f"{path}:CONFIG")) == (
        "`model.py:CONFIG` is not a model\n"
        f"  where: {path}\n"
        "  why: it is of type dict: neither an nn.Module nor something that makes one"
    )


def test_an_instance_takes_no_arguments(write: Write) -> None:
    path = write(NET, "model = Net()\n")
    assert str(refusal(path, width=3)) == (
        "`model.py:model` takes no arguments\n"
        "  why: it is an instance of Net already\n"
        "  hint: name the class or function that makes it, or leave the arguments out"
    )


def test_missing_arguments_are_named(write: Write) -> None:
    path = write("from torch import nn\n", BLOCK)
    assert str(refusal(f"{path}:Block", stride=2)) == (
        "`model.py:Block` needs arguments: channels\n"
        f"  where: {line_of(path, 'class Block')}\n"
        "  hint: --model-arg channels=VALUE"
    )


def test_an_argument_that_is_not_taken_says_so(write: Write) -> None:
    error = refusal(write(NET), widht=3)
    assert error.what == "`model.py:Net` failed to build its model"
    assert error.why is not None
    assert "unexpected keyword argument 'widht'" in error.why


@pytest.mark.parametrize(
    ("body", "returned"),
    [("pass", "None"), ("return Net", "the class Net"), ("return Net(), 1", "a tuple")],
)
def test_a_factory_that_returns_no_module_is_refused(write: Write, body: str, returned: str) -> None:
    path = write(NET, f"def build_model():\n    {body}\n")
    assert str(refusal(path)) == (
        f"`model.py:build_model` returned {returned}, not an nn.Module\n"
        f"  where: {line_of(path, 'def build_model')}\n"
        "  hint: return the model, and nothing else"
    )


def test_a_factory_that_raises_is_shown_at_the_line_in_the_file(write: Write) -> None:
    path = write(NET, "def build_model():\n    return make()\ndef make():\n    return nn.Linear(-1, 'a')\n")
    error = refusal(path)
    assert error.what == "`model.py:build_model` failed to build its model"
    assert error.where == line_of(path, "nn.Linear(-1")
    assert error.why == f"{type(error.__cause__).__name__}: {error.__cause__}"


# Executing a file.


def test_a_missing_file_gets_close_matches(write: Write, tmp_path: Path) -> None:
    write("", name="model.py")
    assert str(refusal(tmp_path / "modle.py")) == (
        f"there is no file modle.py\n  where: {tmp_path}\n  hint: in that folder: model.py"
    )
    assert refusal(tmp_path / "none" / "model.py").hint is None


def test_a_file_that_raises_is_shown_at_its_line(write: Write) -> None:
    path = write("def check(x):\n    raise ValueError('bad width')\ncheck(3)\n", name="broken.py")
    error = refusal(path)
    assert str(error) == (
        "broken.py failed when it was executed\n"
        f"  where: {line_of(path, 'raise ValueError')}\n"
        "  why: ValueError: bad width"
    )
    assert isinstance(error.__cause__, ValueError)


def test_a_file_that_raises_leaves_no_module_behind(write: Write) -> None:
    refusal(write("raise RuntimeError\n", name="broken_file.py"))
    assert not any("broken_file" in name for name in sys.modules)


def test_a_syntax_error_is_shown_at_its_line(write: Write) -> None:
    path = write("x = 1\ndef f(:\n")
    error = refusal(path)
    assert (error.where, type(error.__cause__)) == (f"{path}:2", SyntaxError)


def test_a_missing_import_is_shown_where_it_stands(write: Write) -> None:
    path = write("import torch\nimport no_such_library\n")
    assert str(refusal(path)) == (
        "model.py failed when it was executed\n"
        f"  where: {path}:2\n"
        "  why: ModuleNotFoundError: No module named 'no_such_library'"
    )


def test_a_script_that_exits_is_told_about_the_main_guard(write: Write) -> None:
    error = refusal(write("import sys\nsys.exit(2)\n"))
    assert error.why == "SystemExit: 2"
    assert error.hint == "move what the script runs under `if __name__ == '__main__':`"


def test_a_file_of_a_package_is_told_about_the_module_form(write: Write) -> None:
    error = refusal(write("from .layers import Net\n"))
    assert error.hint == "the file belongs to a package: name it as package.module:NAME"


def test_a_file_can_import_its_neighbours_now_and_when_it_builds(write: Write, serial: str) -> None:
    write(NET, name=f"{serial}_now.py")
    write("DEPTH = 3", name=f"{serial}_later.py")
    late = f"def build_model():\n    import {serial}_later as later\n    return Net(later.DEPTH)\n"
    before = list(sys.path)
    loaded = load(write(f"from {serial}_now import Net\n{late}"))
    assert loaded.model.linear.in_features == 3
    assert sys.path == before


def test_a_file_that_cleans_the_path_itself_is_no_trouble(write: Write) -> None:
    before = list(sys.path)
    load(write("import sys\nsys.path.pop(0)\n", NET))
    assert sys.path == before


def test_dataclasses_and_pickle_work_in_a_file(write: Write) -> None:
    config = """
        from dataclasses import dataclass
        @dataclass
        class Config:
            width: "int" = 4
        def build_model(): return Net(Config().width)
    """
    model = load(write("from __future__ import annotations\n", NET, config)).model
    assert pickle.loads(pickle.dumps(model)).linear.in_features == 4


def test_the_same_file_can_be_loaded_twice(write: Write) -> None:
    path = write(NET)
    assert type(load(path).model) is not type(load(path).model)


# Fresh models.


def test_a_factory_makes_new_models_with_the_arguments(write: Write) -> None:
    loaded = load(write(NET), width=6)
    assert loaded.factory is not None
    fresh = loaded.factory()
    assert fresh.linear.in_features == 6
    assert not torch.equal(fresh.linear.weight, loaded.model.linear.weight)


def test_an_instance_in_a_file_is_made_anew_by_executing_it_again_only_when_asked(write: Write) -> None:
    count = "from pathlib import Path\nlog = Path(__file__).with_suffix('.log')\nlog.open('a').write('x')\n"
    path = write(NET, count, "model = Net()\n")
    loaded = load(path)
    assert path.with_suffix(".log").read_text() == "x"
    assert loaded.factory is not None
    models = [loaded.model, loaded.factory(), loaded.factory()]
    assert path.with_suffix(".log").read_text() == "xxx"
    assert len({model.linear.weight.data_ptr() for model in models}) == 3
    assert len({type(model) for model in models}) == 3


def test_an_instance_that_the_file_imports_has_no_factory(write: Write, serial: str) -> None:
    write(NET, "model = Net()\n", name=f"{serial}.py")
    assert load(write(f"from {serial} import model\n")).factory is None


def test_a_factory_that_repeats_itself_is_refused(write: Write) -> None:
    loaded = load(write(NET, "net = Net()\ndef get_model(): return net\n"))
    assert loaded.factory is not None
    with pytest.raises(SourceError) as caught:
        loaded.factory()
    assert str(caught.value) == (
        "`model.py:get_model` gives the same module every time\n"
        "  why: every peer starts from a module of its own\n"
        "  hint: build a new module on every call"
    )


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


def test_what_transformers_does_not_know_is_refused(bert: Path, tmp_path: Path) -> None:
    assert "BertForNothing" in refusal(f"hf:{bert}", architecture="BertForNothing").what
    assert "takes no num_lables" in refusal(f"hf:{bert}", num_lables=3).what
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
