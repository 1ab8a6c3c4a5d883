"""What a bare file gives, and what is said of one that fails."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxcollab.errors import SourceError
from fxcollab.sources.load import load as load_source
from fxcollab.sources.source import Source
from tests.sources.helpers import BLOCK, NET, Write, line_of, load, refusal

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
        "  why: it is of type dict: neither an nn.Module nor something that makes one\n"
        "  hint: name a module, or a class or function that makes one: model.py:NAME"
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


def test_a_method_of_a_function_is_no_factory(write: Write) -> None:
    path = write(NET, "def build_model():\n    return Net()\n")
    assert "returned None, not an nn.Module" in str(refusal(f"{path}:build_model.__init__"))


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


def test_a_file_that_is_no_python_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(SourceError, match=r"model\.txt is not a Python file"):
        load_source(Source("file", str(tmp_path / "model.txt")))
