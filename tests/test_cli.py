"""The command line: what each command writes, says and returns, and what every bad input is answered with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from fxcollab_cli.app import app
from fxcollab_cli.completion import sources
from fxcollab_cli.console import run
from fxcollab_cli.parsing import default_directory
from fxcollab_cli.planning import Options
from safetensors.torch import load_file, save_file
from torch import nn

import fxcollab
from fxcollab.costs.summary import Summary
from fxcollab.io.weights import load_state_dict, write_state_dict
from fxcollab.patterns import PATTERNS
from fxcollab.rewriting.init_rules import INITS
from fxcollab.sources.load import load
from fxcollab.sources.load import load as load_source
from fxcollab.sources.source import Source
from fxcollab.tracing.capture import Granularity
from tests.fonts import needs_a_font
from tests.speeds import slow_but

NET = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=4):
            super().__init__()
            self.stem = nn.Linear(3, width)
            self.probe = nn.Linear(width, 1)
            self.body = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
            self.head = nn.Linear(width, 2)

        def forward(self, x):
            x = self.stem(x)
            self.probe(x)
            return self.head(self.body(x))
"""


@dataclass(frozen=True)
class Result:
    """What a call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


Call = Callable[..., Result]
Write = Callable[..., Path]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the application in this process, in an empty folder, as if its output were piped."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TERMINAL_WIDTH"):
        monkeypatch.delenv(name, raising=False)

    def run_app(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fxcollab", *map(str, arguments)])
        capsys.readouterr()
        code = run(app)
        return Result(code, *capsys.readouterr())

    return run_app


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(*parts: str, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(map(textwrap.dedent, parts)))
        return path

    return write_file


@pytest.fixture
def model(write: Write) -> Path:
    """A user's model.py in the current folder."""
    return write(NET)


@pytest.fixture
def made(call: Call, model: Path) -> Path:
    """The directory that transform writes for two splits."""
    assert call("transform", "model.py", "--splits", "stem,body.1").code == 0
    return Path("model_collab")


def net(file: Path | str = "model.py") -> nn.Module:
    return load(Source.parse(str(file))).model


# transform.


def test_transform_writes_an_artifact_and_sums_it_up(call: Call, model: Path) -> None:
    result = call("transform", "model.py", "--pattern", "hierarchical", "--splits", "stem,body.1")
    assert result.code == 0
    assert result.err == "wrote model_collab/, to be loaded by fxcollab.load('model_collab')\n"
    assert result.out == textwrap.dedent("""\
        4 heads, hierarchical, seed 0, init fresh
        start       only head 0 has the given weights behind the splits, the others start anew
        trunk       once, 16 parameters: x, stem
        level 1     2 branches behind stem, 33 parameters each: probe, body_0, body_1
        level 2     4 branches behind body.1, 10 parameters each: body_2, head
        parameters  59 -> 122  (2.07x)
        FLOPs       400 -> 896  (2.24x)  a training step, input 2x3, guessed: set --input, in Python example_inputs
        memory      808B -> 1.632kB  (2.02x)  its peak, with SGD and momentum
        + 9 cloned  ~ 3 rescaled  = 2 shared
        """)
    assert sorted(path.name for path in Path("model_collab").iterdir()) == [
        "diff.html",
        "graph.py",
        "plan.json",
        "weights.safetensors",
    ]
    train_model = fxcollab.load("model_collab")
    assert len(train_model(torch.randn(2, 3))) == 4
    assert f"{fxcollab.summarise(train_model)}\n" == result.out


@pytest.mark.parametrize(
    ("source", "directory"),
    [
        ("model.py", "model_collab"),
        ("nets/model.py", "model_collab"),
        ("/nets/resnet32.py:build", "resnet32_collab"),
        ("package.module:Net", "Net_collab"),
        ("package.module:Outer.Inner", "Outer.Inner_collab"),
        ("torchvision:resnet50", "resnet50_collab"),
        ("timm:resnet18.a1_in1k", "resnet18.a1_in1k_collab"),
        ("hf:gpt2", "gpt2_collab"),
        ("hf:gpt2/", "gpt2_collab"),
        ("hf:google/vit-base", "vit-base_collab"),
        ("hf:./some/dir/", "dir_collab"),
        ("hf:/some/dir", "dir_collab"),
        ("hf:.", f"{Path.cwd().name}_collab"),
        ("hf:dir/..", f"{Path.cwd().name}_collab"),
    ],
)
def test_the_default_directory_is_named_after_the_source(source: str, directory: str) -> None:
    assert default_directory(source) == Path(directory)


_numbers = itertools.count()


@pytest.mark.parametrize(
    "form", ["model.py", "model.py:Net", "{tmp}/model.py", "{package}.nets:Net", "{package}.nets:net"]
)
def test_every_form_of_a_source_is_taken(call: Call, write: Write, tmp_path: Path, form: str) -> None:
    package = f"cli_case_{next(_numbers)}"
    write(NET)
    write(NET, "\nnet = Net()\n", name=f"{package}/nets.py")
    write("", name=f"{package}/__init__.py")
    source = form.format(tmp=tmp_path, package=package)
    result = call("transform", source, "--splits", "stem", "-o", "out")
    assert (result.code, result.err) == (0, "wrote out/, to be loaded by fxcollab.load('out')\n")
    assert call("verify", "out", "--input", "2x3").code == 0


def test_a_torchvision_model_is_taken(call: Call) -> None:
    arguments = ("--model-arg", "num_classes=2", "--pattern", "simple", "--splits", "stage4", "--heads", "3")
    result = call("transform", "torchvision:shufflenet_v2_x0_5", *arguments, "--json")
    assert result.code == 0
    assert result.json["directory"] == "shufflenet_v2_x0_5_collab"
    assert result.json["levels"][1]["nodes"] == ["conv5", "mean", "fc"]
    assert result.json["inputs"] == "2x3x224x224"
    assert fxcollab.load("shufflenet_v2_x0_5_collab").fc.out_features == 2


@pytest.mark.slow
def test_a_timm_model_is_taken_and_proved(call: Call) -> None:
    arguments = ("--model-arg", "num_classes=3", "--input", "2x3x64x64", "--splits", "layer3", "--pattern", "simple")
    assert call("transform", "timm:resnet10t", *arguments).code == 0
    assert call("verify", "resnet10t_collab", "--input", "3x3x64x64").code == 0


@pytest.mark.slow
def test_a_model_that_transformers_saved_is_taken_and_proved(call: Call, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16, "patch_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=3)).save_pretrained(tmp_path / "vit")
    assert call("transform", "hf:vit", "--splits", "vit.layers.0,vit.layers.1").code == 0
    assert json.loads(Path("vit_collab/plan.json").read_text())["source"]["location"] == "../vit"
    assert call("verify", "vit_collab").code == 0
    assert (
        call("transform", "hf:vit/", "--splits", "vit.layers.0", "--force", "--json").json["directory"]
        == "vit_collab"
    )


ASKING = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.a(x)
            if x.abs().max() > 100:
                h = h * 2
            return self.c(self.b(h))
"""


@pytest.mark.slow
def test_a_directory_of_a_model_that_asks_for_data_can_be_read_again_and_again(call: Call, write: Write) -> None:
    file = write(ASKING)
    assert call("transform", "model.py", "--splits", "a,b", "--input", "4x8").code == 0
    for _ in range(2):
        assert call("verify", "model_collab").code == 0
        assert call("verify", "model_collab", "--input", "5x8").code == 0
    file.write_text("# a line more\n" + file.read_text())
    assert call("verify", "model_collab").code == 0


def test_splits_lists_where_a_model_can_be_cut(call: Call) -> None:
    result = call("splits", "torchvision:resnet18", "--input", "2x3x64x64")
    rows = [line.split() for line in result.out.splitlines()]
    assert result.code == 0
    row = next(row for row in rows if row[0] == "layer2")
    assert row[1] == "2x128x8x8"
    assert row[-1] == "*"
    found = call("splits", "torchvision:resnet18", "--input", "2x3x64x64", "--json").json
    assert [c["name"] for c in found if c["ends_stage"]] == ["relu", "layer1", "layer2", "layer3", "layer4"]
    assert all(0 <= c["share"] <= 1 for c in found)


def test_splits_says_where_no_single_value_will_do(call: Call, write: Write) -> None:
    write(
        """
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

            def forward(self, x):
                return self.c(self.a(x)) + self.d(self.b(x))
        """
    )
    result = call("splits", "model.py")
    assert (result.code, "a+b" in result.out) == (0, True)


def test_model_arguments_reach_the_factory(call: Call, model: Path) -> None:
    assert call("transform", "model.py", "--model-arg", "width=6", "--splits", "stem").code == 0
    assert fxcollab.load("model_collab").stem.out_features == 6


def test_json_holds_the_whole_summary(call: Call, model: Path) -> None:
    result = call("transform", "model.py", "--splits", "stem", "--input", "5x3", "--json")
    assert result.code == 0
    assert set(result.json) == {"directory", *(field.name for field in dataclasses.fields(Summary))}
    assert result.json["directory"] == "model_collab"
    assert result.json["parameters"] == [59, 59 + 5 + 28 + 10]
    assert (result.json["inputs"], result.json["guessed"]) == ("5x3", False)
    assert "wrote model_collab/" in result.err


def test_fanouts_heads_and_patterns(call: Call, model: Path) -> None:
    for heads, arguments in (
        (6, ("--splits", "stem,body.1", "--fanouts", "2,3")),
        (3, ("--pattern", "simple", "--splits", "stem", "--heads", "3")),
        (2, ("--pattern", "multi-instance")),
    ):
        result = call("transform", "model.py", *arguments, "--json", "--force")
        assert (result.code, result.json["heads"]) == (0, heads)


def test_without_rescale_there_are_no_rescale_nodes(call: Call, model: Path) -> None:
    result = call("transform", "model.py", "--splits", "stem", "--no-rescale", "--json")
    assert (result.code, result.json["rescaled"]) == (0, 0)
    assert "rescale" not in Path("model_collab/graph.py").read_text()
    assert call("verify", "model_collab").out.count("gradients are the sum") == 1


def test_granularity_op_opens_down_to_operations(call: Call, model: Path) -> None:
    nodes = {}
    for granularity in ("auto", "op"):
        result = call("transform", "model.py", "--splits", "stem", "--granularity", granularity, "--json", "--force")
        assert result.code == 0
        nodes[granularity] = result.json["levels"][1]["nodes"]
    assert nodes == {"auto": ["probe", "body", "head"], "op": ["probe", "body_0", "body_1", "body_2", "head"]}


def test_the_seed_decides_the_peers(call: Call, model: Path) -> None:
    states = []
    for seed in (1, 1, 2):
        call("transform", "model.py", "--splits", "stem", "--seed", seed, "--force")
        states.append(load_state_dict("model_collab/weights.safetensors")["peers.b1.head.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_an_input_may_have_a_type(call: Call, write: Write) -> None:
    write("""
        from torch import nn

        model = nn.Sequential(nn.Embedding(2, 3), nn.Linear(3, 2))
    """)
    result = call("transform", "model.py", "--splits", "0", "--input", "5x7:int64", "--json")
    assert (result.code, result.json["inputs"]) == (0, "5x7:int64")
    assert call("verify", "model_collab", "--input", "5x7:int64").code == 0
    wrong = call("verify", "model_collab", "--input", "5x7")
    assert wrong.code == 2 and "The model fails on the example inputs." in wrong.err


def test_several_inputs_are_given_one_by_one(call: Call, write: Write) -> None:
    write("""
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 2)

            def forward(self, x, y):
                return self.c(self.a(x) + self.b(y))
    """)
    unknown = call("transform", "model.py", "--splits", "a+b")
    assert "FLOPs       unknown: its inputs are x, y (set --input, in Python example_inputs)\n" in unknown.out
    assert call("verify", "model_collab").code == 2
    result = call("transform", "model.py", "--splits", "a+b", "--input", "2x3", "--input", "2x5", "--force")
    assert "a training step, input 2x3, 2x5\n" in result.out
    assert call("verify", "model_collab").code == 0


def test_inputs_are_given_by_name(call: Call, write: Write) -> None:
    write("""
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

            def forward(self, x, *, scale=None, keep=None):
                x = self.stem(x) if scale is None else self.stem(x) * scale
                return self.head(x if keep is None else x.masked_fill(~keep, 0.0))
    """)
    named = ("--input", "keep=2x4:bool", "--input", "x=2x3")
    made = call("transform", "model.py", "--splits", "stem", *named)
    assert (made.code, "input 2x3, 2x4:bool\n" in made.out) == (0, True)
    plan = json.loads(Path("model_collab/plan.json").read_text())
    assert [each["name"] for each in plan["inputs"]] == ["x", "keep"]
    assert call("verify", "model_collab", *named).code == 0
    again = call("transform", "model_collab", "-o", "other", "--input", "x=5x3", "--input", "scale=5x4")
    assert (again.code, "input 5x3, 5x4\n" in again.out) == (0, True)
    for inputs, words in {
        ("x=2x3", "2x4:bool"): "Some inputs are given by name, some without.",
        ("x=2x3", "x=2x4"): "The input x is given twice.",
        ("x=2x3", "mask=2x4"): "unexpected keyword argument 'mask'",
        ("x=", "keep=2x4"): "Input '' can't be read.",
    }.items():
        given = ("--input", inputs[0], "--input", inputs[1])
        refused = call("transform", "model.py", "--splits", "stem", *given, "--force")
        assert refused.code == 2 and words in refused.err and "hint: " in refused.err


def test_an_input_that_does_not_fit_is_refused_and_nothing_is_written(call: Call, model: Path) -> None:
    refused = call("transform", "model.py", "--splits", "stem", "--input", "2x4")
    assert not Path("model_collab").exists()
    assert call("transform", "model.py", "--splits", "stem").code == 0
    for result in (refused, call("verify", "model_collab", "--input", "2x4")):
        assert result.code == 2 and result.out == ""
        assert re.match(
            r"error: The model fails on the example inputs\.\n  where: .*\n  why: RuntimeError: .*\n  hint: ",
            result.err,
        )


def test_too_many_inputs_are_refused(call: Call, model: Path) -> None:
    result = call("transform", "model.py", "--splits", "stem", "--input", "2x3", "--input", "2x3")
    assert result.code == 2 and "The example inputs don't fit the model." in result.err


def test_force_replaces_the_directory(call: Call, made: Path) -> None:
    assert call("transform", "model.py", "--splits", "stem", "--force").code == 0
    assert json.loads((made / "plan.json").read_text())["splits"] == ["stem"]


def test_a_failed_transform_leaves_nothing_behind(call: Call, model: Path) -> None:
    before = sorted(Path().iterdir())
    assert call("transform", "model.py", "--splits", "nowhere").code == 2
    assert [path for path in sorted(Path().iterdir()) if path.name != "__pycache__"] == before


def test_the_graph_after_every_pass_is_shown_before_the_summary(call: Call, model: Path) -> None:
    plain = call("transform", "model.py", "--splits", "stem").out
    result = call("transform", "model.py", "--splits", "stem", "--print-passes", "--force")
    assert result.code == 0 and result.out.endswith(plain)
    graphs = re.findall(r"^(\w+): graph\(\):\n((?:    .*\n)+)", result.out, re.MULTILINE)
    assert [name for name, _ in graphs] == ["capture", "partition", "rewrite", "codegen"]
    assert ["rescale" in graph for _, graph in graphs] == [False, False, True, True]
    assert re.search(r"^level 0: x, .*stem\nlevel 1: .*output$", result.out, re.MULTILINE)


def test_graphs_after_passes_leave_json_alone_and_show_where_a_pass_fails(call: Call, model: Path) -> None:
    result = call("transform", "model.py", "--splits", "stem", "--print-passes", "--json")
    assert result.json["heads"] == 2 and "capture: graph():" in result.err
    failed = call("transform", "model.py", "--splits", "head", "--print-passes", "-o", "out")
    assert failed.code == 2 and failed.out.startswith("capture: graph():") and "rewrite" not in failed.out


# verify.


def test_verify_proves_a_directory(call: Call, made: Path) -> None:
    result = call("verify", made)
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    assert lines[0].startswith("ok          every node belongs to a head: ")
    assert lines[1].startswith("ok          graph of head 0 equals the original's: ")
    assert lines[-1] == "all 24 checks hold"
    assert "FAILED" not in result.out


def test_verify_proves_a_source_without_writing(call: Call, model: Path) -> None:
    result = call("verify", "model.py", "--pattern", "simple", "--splits", "stem", "--heads", "3", "--json")
    assert result.code == 0
    assert set(result.json) == {"ok", "checks", "limitations"} and result.json["ok"] is True
    assert all(set(check) == {"name", "ok", "detail", "checked"} for check in result.json["checks"])
    assert all(check["ok"] and check["checked"] for check in result.json["checks"])
    assert [check["name"] for check in result.json["checks"] if "head 2" in check["name"]] == [
        "graph of head 2 equals the original's",
        "head 2 in train mode equals the original with head 2's weights",
        "head 2 in eval mode equals the original with head 2's weights",
    ]
    assert sorted(path.name for path in Path().iterdir()) in (["model.py"], ["__pycache__", "model.py"])


DRIFTING = """
    from torch import nn

    class Drift(nn.Module):
        calls = 0

        def forward(self, x):
            Drift.calls += 1
            return x * Drift.calls

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Drift()), nn.Linear(4, 2))
"""


@pytest.mark.parametrize("options", slow_but([()], [(), ("--json",)]))
def test_verify_exits_with_1_when_a_check_fails(call: Call, write: Write, options: tuple[str, ...]) -> None:
    write(DRIFTING)
    result = call("verify", "model.py", "--splits", "0", *options)
    assert (result.code, result.err) == (1, "")
    if options:
        assert result.json["ok"] is False
        assert any("differs by up to" in check["detail"] for check in result.json["checks"] if not check["ok"])
    else:
        assert re.search(r"^FAILED {6}head \d in train mode equals", result.out, re.MULTILINE)
        assert re.search(r"^\d+ of \d+ checks failed$", result.out, re.MULTILINE)


def test_checks_that_could_not_be_made_are_not_said_to_hold(call: Call, write: Write) -> None:
    write("from torch import nn\nmodel = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to('meta')")
    result = call("verify", "model.py", "--splits", "0")
    assert result.code == 0
    unmade = re.findall(r"^- {11}.*: not checked: ", result.out, re.MULTILINE)
    made = re.findall(r"^ok {10}", result.out, re.MULTILINE)
    assert unmade and made
    assert result.out.splitlines()[-1] == f"{len(made)} checks hold, {len(unmade)} could not be made"


def test_verify_refuses_plan_options_with_a_directory(call: Call, made: Path) -> None:
    result = call("verify", made, "--splits", "stem", "--seed", "3")
    assert (result.code, result.out) == (2, "")
    assert "--splits, --seed can't be given with a directory." in result.err


def test_what_was_given_up_is_shown(call: Call, write: Write) -> None:
    write(NET.replace("forward(self, x)", "forward(self, x, scale=1.0)"))
    for command in ("transform", "verify"):
        result = call(command, "model.py", "--splits", "stem")
        assert result.code == 0
        assert "limitation  optional inputs scale are fixed at their defaults" in result.out


# prune.


def test_a_pruned_head_loads_into_the_original_and_equals_it(call: Call, made: Path) -> None:
    x = torch.randn(5, 3)
    train_model = fxcollab.load(made).eval()
    for head in range(4):
        result = call("prune", made, "--head", head, "-o", "heads/one.safetensors", "--force")
        assert (result.code, result.out) == (0, "")
        assert result.err == f"wrote heads/one.safetensors: 13 tensors of head {head}\n"
        original = net().eval()
        original.load_state_dict(load_file("heads/one.safetensors"), strict=True)
        assert torch.equal(original(x), fxcollab.all_heads(train_model)(x)[head])


def test_prune_keeps_head_0_by_default_and_needs_no_model(call: Call, made: Path, model: Path) -> None:
    expected = fxcollab.prune(fxcollab.load(made)).state_dict()
    model.write_text("raise RuntimeError('not to be executed')")
    result = call("prune", made, "-o", "head0.safetensors", "--json")
    assert result.json == {"file": "head0.safetensors", "head": 0, "tensors": 13}
    found = load_file("head0.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_prune_takes_another_checkpoint(call: Call, made: Path) -> None:
    state = {f"module.{name}": value + 1 for name, value in load_state_dict(made / "weights.safetensors").items()}
    write_state_dict(state, Path("epoch9.safetensors"))
    assert call("prune", made, "--weights", "epoch9.safetensors", "--head", 1, "-o", "one.safetensors").code == 0
    assert torch.equal(load_file("one.safetensors")["head.weight"], state["module.peers.b0_1.head.weight"])
    assert torch.equal(load_file("one.safetensors")["stem.weight"], state["module.stem.weight"])


def test_an_existing_output_needs_force(call: Call, made: Path) -> None:
    assert call("prune", made, "-o", "kept.safetensors").code == 0
    result = call("prune", made, "-o", "kept.safetensors", "--head", 1)
    assert result.err.startswith("error: The output file exists.\n  where: kept.safetensors\n  hint: ")
    assert result.code == 2 and "--force" in result.err
    first = load_file("kept.safetensors")["head.weight"]
    assert call("prune", made, "-o", "kept.safetensors", "--head", 1, "--force").code == 0
    assert not torch.equal(load_file("kept.safetensors")["head.weight"], first)


def test_force_replaces_only_what_prune_wrote(call: Call, made: Path) -> None:
    Path("mine.safetensors").write_text("mine")
    save_file({"w": torch.ones(2)}, "other.safetensors")
    shutil.copy(made / "weights.safetensors", "all.safetensors")
    Path("link").symlink_to("mine.safetensors")
    os.mkfifo("pipe")
    for name in ("mine.safetensors", "other.safetensors", "all.safetensors", "link", "pipe", "/dev/null"):
        before = os.lstat(name)
        result = call("prune", made, "-o", name, "--force")
        assert result.code == 2 and "The output is not replaced." in result.err, result.err
        after = os.lstat(name)  # which was read, so that its time of access may differ
        assert os.path.samestat(after, before) and after.st_ctime_ns == before.st_ctime_ns
    result = call("prune", made, "-o", made / "weights.safetensors", "--force")
    assert result.code == 2 and "The output is an artifact's own weights." in result.err


# Two streams.


NOISY = """
    import sys, warnings
    print("imported")
    warnings.warn("mind the gap")
"""


@pytest.mark.parametrize("command", ["transform", "verify"])
def test_what_the_users_file_prints_does_not_disturb_the_data(call: Call, write: Write, command: str) -> None:
    write(NOISY, NET.replace("super()", 'print("built"); super()').replace("x = self", 'print("run"); x = self'))
    result = call(command, "model.py", "--splits", "stem", "--json")
    assert result.code == 0
    assert isinstance(result.json, dict)
    assert {"imported", "built", "run", "note: mind the gap"} <= set(result.err.splitlines())


def test_a_warning_is_noted_once(call: Call, write: Write) -> None:
    write("""
        import torch

        def build_model():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    """)
    result = call("transform", "model.py", "--splits", "0")
    assert result.err.count("note: the factory makes the same weights at every call") == 1


@pytest.mark.parametrize("width", [None, 60])
def test_output_has_no_colour_in_a_pipe_and_fits_the_width_where_one_is_set(
    call: Call, write: Write, monkeypatch: pytest.MonkeyPatch, width: int | None
) -> None:
    name = "a_rather_long_name_for_the_first_layer"
    write(NET.replace("stem", name).replace("self.probe", "self.probe_of_a_long_name"))
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (("transform", "model.py", "--splits", f"{name},body"), ("verify", "model_collab"), ("--help",)):
        result = call(*arguments)
        assert result.code == 0
        assert max(map(len, result.out.splitlines())) <= (width or 1000)
        entries = [line for line in result.out.splitlines() if not line.startswith("all ")]
        assert width or arguments[0] != "verify" or all(line.startswith("ok    ") for line in entries)
        assert "\x1b" not in result.out + result.err and "…" not in result.out
        assert not re.search(r" $", result.out, re.MULTILINE)
        assert name in result.out or arguments[0] != "transform"


def test_what_is_told_is_told_where_there_is_no_width(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    result = call("diff", "nope.py")
    assert result.code == 2 and "error: there is no file nope.py" in result.err


# Help.


@pytest.mark.parametrize("command", ["transform", "verify", "prune"])
def test_the_help_of_every_command_names_its_options(call: Call, command: str) -> None:
    result = call(command, "--help")
    assert (result.code, result.err) == (0, "")
    options = {
        "transform": ("--splits", "--fanouts", "--model-arg", "--input", "--force", "torchvision:NAME", "-o,"),
        "verify": ("--splits", "directory", "Exits with 1", "--json"),
        "prune": ("--head", "--weights", "-o,", "--force"),
    }
    assert all(option in result.out for option in options[command])
    assert "--debug" in result.out and "Traceback" not in result.out


def test_help_lists_the_commands_without_cutting_them_off(call: Call) -> None:
    result = call("--help")
    assert result.code == 0
    assert all(
        re.search(rf"^  {command}  +\w.*\.$", result.out, re.MULTILINE)
        for command in ("transform", "verify", "prune")
    )
    assert "..." not in result.out.partition("Commands:")[2]


def test_no_command_shows_the_help_and_is_trouble(call: Call) -> None:
    result = call()
    assert (result.code, result.out) == (2, "")
    assert "Commands:" in result.err


def test_the_version_is_shown(call: Call) -> None:
    result = call("--version")
    assert (result.code, result.out) == (0, f"fxcollab {importlib.metadata.version('fxcollab')}\n")


# Bad input.


def transform(*arguments: str) -> tuple[str, ...]:
    return ("transform", "model.py", "-o", "out", *arguments)


BAD_INPUT = {
    "unknown split": (
        transform("--splits", "stern"),
        ["There is no module and no node named 'stern'.", "hint: did you mean stem?"],
    ),
    "unknown inner split": (transform("--splits", "body.9"), ["named 'body.9'", "did you mean body."]),
    "no call of that number": (
        transform("--splits", "stem@2"),
        ["There is no call 'stem@2'.", "stem is called once"],
    ),
    "split off the path": (
        transform("--splits", "probe"),
        ["Split 'probe' is not on the path to the output.", "node 'probe'", "hint: on the path are stem, body, head"],
    ),
    "wrong order": (
        transform("--splits", "body,stem"),
        ["'body' lies behind 'stem', which is named after it.", "hint: name them in this order: stem,body"],
    ),
    "split without effect": (
        transform("--splits", "head"),
        ["Split 'head' has no effect.", "no parameter lies between it and the output", "towards the input"],
    ),
    "first split without effect": (
        transform("--splits", "body.1,body.2"),
        ["Split 'body.1' has no effect.", "give 'body.2' a larger fan-out"],
    ),
    "no split": (transform(), ["Pattern 'hierarchical' needs a split."]),
    "split twice": (transform("--splits", "stem,stem"), ["Split stem is named twice."]),
    "budget of named splits": (
        transform("--splits", "stem", "--max-time", "1.5x"),
        ["--max-time can't be given with named splits.", "hint: let them be chosen: --splits auto"],
    ),
    "unreadable budget": (
        transform("--splits", "auto", "--max-memory", "much"),
        ["Budget 'much' can't be read.", "--max-memory 1.75x"],
    ),
    "budget below the original's cost": (
        transform("--splits", "auto", "--max-memory", "0.5x"),
        ["A budget of 0.5x the memory can't be kept.", "hint: give 1 or more"],
    ),
    "budget that nothing keeps": (
        transform("--splits", "auto", "--max-time", "1"),
        [
            "No choice of 2 splits keeps within 1x the time.",
            "why: of 3 that are tried the cheapest is",
            "hint: raise",
        ],
    ),
    "one head": (
        transform("--pattern", "simple", "--splits", "stem", "--heads", "1"),
        ["at least 2 heads, but heads is 1", "a head learns from the others"],
    ),
    "one branch": (transform("--splits", "stem", "--fanouts", "1"), ["at least 2 heads, but a fan-out is 1"]),
    "fan-outs that don't match": (
        transform("--splits", "stem,body", "--fanouts", "2,2,2"),
        ["2 splits need 2 fan-outs, not 3.", "splits are stem, body and fan-outs 2, 2, 2"],
    ),
    "heads that don't match": (
        transform("--splits", "stem,body", "--heads", "3"),
        ["2 splits with fan-outs 2, 2 make 4 heads, not 3."],
    ),
    "fan-outs that are no numbers": (
        transform("--splits", "stem", "--fanouts", "two"),
        ["Fan-outs 'two' can't be read.", "--fanouts 2,3"],
    ),
    "unknown pattern": (
        transform("--pattern", "hierarchy", "--splits", "stem"),
        ["There is no pattern 'hierarchy'.", "hint: did you mean hierarchical?"],
    ),
    "splits of independent instances": (
        transform("--pattern", "multi-instance", "--splits", "stem"),
        ["'multi-instance' takes no splits, but stem is given."],
    ),
    "copies that never differ": (
        transform("--splits", "stem", "--init", "copy"),
        ["Peers that start as copies would never differ from head 0.", "init='fresh'"],
    ),
    "unknown init": (transform("--splits", "stem", "--init", "zeros"), ["There is no init 'zeros'.", "fresh, copy"]),
    "unknown granularity": (
        transform("--splits", "stem", "--granularity", "fine"),
        ["There is no granularity 'fine'.", "'auto' or 'op'"],
    ),
    "input that is no shape": (
        transform("--splits", "stem", "--input", "2,3"),
        ["Input '2,3' can't be read.", "1x3x224x224"],
    ),
    "input without elements": (transform("--splits", "stem", "--input", "0x3"), ["Input '0x3' can't be read."]),
    "input of no type": (transform("--splits", "stem", "--input", "2x3:words"), ["Input '2x3:words' can't be read."]),
    "too many inputs": (
        transform("--splits", "stem", "--input", "2x3", "--input", "2x3"),
        ["The example inputs don't fit the model.", "too many positional arguments"],
    ),
    "no file": (("transform", "modle.py", "-o", "out"), ["there is no file modle.py", "in that folder: model.py"]),
    "no name in the file": (
        ("transform", "model.py:Nett", "-o", "out"),
        ["`model.py` has no `Nett`", "did you mean Net"],
    ),
    "no source": (("transform", "model", "-o", "out"), ["`model` is not a source", "write model.py, model.py:NAME"]),
    "no torchvision model": (
        ("transform", "torchvision:resnet51", "-o", "out"),
        ["torchvision has no model `resnet51`", "did you mean resnet50"],
    ),
    "no model argument": (transform("--model-arg", "width"), ["`width` is not a model argument", "NAME=VALUE"]),
    "unknown model argument": (transform("--model-arg", "with=3"), ["unexpected keyword argument 'with'"]),
    "no number": (transform("--heads", "two"), ["Invalid value for '--heads'"]),
    "unknown option": (transform("--split", "stem"), ["No such option: --split", "--splits"]),
    "unknown command": (("prone",), ["No such command 'prone'"]),
    "no artifact": (("prune", "nowhere", "-o", "out"), ["There is no artifact here.", "there is no such directory"]),
    "no artifact to verify": (("verify", "."), ["There is no artifact here.", "it has no plan.json"]),
    "no output": (("prune", "nowhere"), ["Missing option", "--output"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_answered_with_what_and_why(call: Call, model: Path, case: str) -> None:
    arguments, expected = BAD_INPUT[case]
    result = call(*arguments)
    assert (result.code, result.out) == (2, ""), result.err
    assert all(text in result.err for text in expected), result.err
    assert "Traceback" not in result.err
    assert not Path("out").exists()


def test_a_file_without_a_model_lists_what_it_has(call: Call, write: Write) -> None:
    write("import torch\n\ndef helper(x): return x\n\nclass Plain: ...\n")
    result = call("transform", "model.py", "--splits", "stem")
    assert result.code == 2
    assert result.err.startswith("error: model.py defines no model\n")
    assert "helper (function, needs x), Plain (class)" in result.err
    assert "hint: name the one you mean, as in model.py:NAME, or call it `model`" in result.err


def test_a_factory_that_raises_is_shown_with_file_and_line(call: Call, write: Write) -> None:
    path = write("def build_model():\n    return 1 / 0\n")
    result = call("transform", "model.py", "--splits", "stem")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "error: `model.py:build_model` failed to build its model\n"
        f"  where: {path}:2\n"
        "  why: ZeroDivisionError: division by zero\n"
        "  code: FXC007\n"
    )


def test_an_output_directory_that_exists_is_refused_before_the_model_is_built(call: Call, write: Write) -> None:
    write("raise RuntimeError('not to be executed')")
    Path("out").mkdir()
    for options, text in (((), "The output directory exists."), (("--force",), "it has no plan.json")):
        result = call("transform", "model.py", "--splits", "stem", "-o", "out", *options)
        assert result.code == 2 and text in result.err


def test_an_output_that_is_a_directory_is_no_file(call: Call, made: Path) -> None:
    result = call("prune", made, "-o", "model_collab", "--force")
    assert result.code == 2 and "The output is a directory." in result.err


@pytest.mark.parametrize(
    "command",
    slow_but([("verify", "model_collab")], [("verify", "model_collab"), ("prune", "model_collab", "-o", "out")]),
)
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("plan.json", "{", "The plan is damaged."),
        ("plan.json", '{"format": 1}', "it has no 'pattern'"),
        ("plan.json", '{"format": 9}', "The plan has another format."),
        ("weights.safetensors", "garbage", "The weights file can't be read."),
    ],
)
def test_a_damaged_artifact_is_named(
    call: Call, made: Path, command: tuple[str, ...], name: str, text: str, expected: str
) -> None:
    (made / name).write_text(text)
    result = call(*command)
    assert (result.code, result.out) == (2, "")
    assert expected in result.err and f"where: model_collab/{name}" in result.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--head", "4"), ["There is no head 4.", "choose one of 0 to 3"]),
        (("--head", "-1"), ["There is no head -1."]),
        (("--weights", "none.safetensors"), ["There is no weights file.", "where: none.safetensors"]),
        (("--weights", "model.py"), ["The weights file can't be read.", "weights are safetensors files"]),
        (("--weights", "single.safetensors"), ["The checkpoint holds no peers.", "state of a single network"]),
    ],
)
def test_prune_refuses_what_it_cannot_prune(
    call: Call, made: Path, arguments: tuple[str, ...], expected: list[str]
) -> None:
    write_state_dict(net().state_dict(), Path("single.safetensors"))
    result = call("prune", made, "-o", "out", *arguments)
    assert result.code == 2 and not Path("out").exists()
    assert all(text in result.err for text in expected), result.err


def test_a_source_that_changed_is_noticed_by_verify(call: Call, made: Path, model: Path) -> None:
    model.write_text(model.read_text().replace("self.head(", "self.head(1 + "))
    result = call("verify", made)
    assert result.code == 2 and "The source no longer makes the graph that was saved." in result.err


# Trouble.


@pytest.mark.parametrize("text", ["def build_model():\n    return 1 / 0\n", "raise SystemExit(0)"])
def test_a_traceback_is_shown_with_debug_only(call: Call, write: Write, text: str) -> None:
    write(text)
    assert "Traceback" not in call("transform", "model.py").err
    result = call("transform", "model.py", "--debug")
    assert result.code == 2
    assert "Traceback (most recent call last)" in result.err and "model.py" in result.err


def test_an_unforeseen_error_is_one_line_and_points_at_debug(
    call: Call, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("it broke\n\nTraceback of the machinery")

    monkeypatch.setattr(fxcollab, "transform", fail)
    result = call("transform", "model.py", "--splits", "stem")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: RuntimeError: it broke\n  hint: --debug shows the traceback\n  code: FXC000\n"
    debug = call("transform", "model.py", "--splits", "stem", "--debug")
    assert debug.code == 2 and "Traceback (most recent call last)" in debug.err


def test_an_interruption_is_neither_success_nor_a_failed_check(call: Call, write: Write) -> None:
    write("raise KeyboardInterrupt")
    result = call("transform", "model.py", "--splits", "stem")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")


# As a process.


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


WITHOUT_TORCH = """
import sys
from fxcollab_cli.start import main
sys.argv = ["fxcollab", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "torchvision", "numpy", "networkx", "safetensors"} & set(sys.modules)
    sys.stderr.write(f"imported: {sorted(heavy)}")
"""


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("transform", "--help"), ("nonsense",)])
def test_help_imports_no_torch(arguments: tuple[str, ...]) -> None:
    result = python("-c", WITHOUT_TORCH, *arguments)
    assert result.returncode == (2 if arguments == ("nonsense",) else 0)
    assert result.stderr.endswith("imported: []"), result.stderr


def test_completion_imports_no_torch() -> None:
    result = python("-c", WITHOUT_TORCH, _FXCOLLAB_COMPLETE="complete_bash", COMP_WORDS="fxcollab tr", COMP_CWORD="1")
    assert "transform" in result.stdout
    assert result.stderr.endswith("imported: []"), result.stderr


def test_the_module_runs_as_a_program() -> None:
    result = python("-m", "fxcollab_cli", "--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("fxcollab ")


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="signals of POSIX")
def test_a_reader_that_goes_away_is_no_failed_check() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "fxcollab_cli", "--help"], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert process.returncode == -signal.SIGPIPE
    assert b"Traceback" not in process.stderr


def test_a_model_file_that_changes_the_directory_changes_nothing(
    call: Call, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model.py").write_text(
        "import os\nfrom torch import nn\nos.chdir('elsewhere')\n"
        "model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))\n"
    )
    assert call("transform", "model.py", "--splits", "0", "--init", "copy-anyway").code == 0
    assert (tmp_path / "model_collab" / "plan.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


# Options.


PLANNED = ("transform", "costs", "diff", "verify")


@pytest.mark.parametrize("command", PLANNED)
def test_every_option_of_the_plan_is_one_of_every_command_that_makes_a_plan(call: Call, command: str) -> None:
    out = call(command, "--help").out
    own = {field.name for field in dataclasses.fields(Options)} - {"source", "given", "plan"}
    assert all(f"--{name.replace('_', '-')} " in out for name in own)


def test_every_option_is_a_parameter_of_the_library_or_makes_the_model() -> None:
    functions = (fxcollab.transform, fxcollab.choose_splits, fxcollab.load)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    own = {field.name for field in dataclasses.fields(Options)}
    assert own - known == {"input", "model_arg", "given", "plan", "fresh"}  # the last one is a part of init


@pytest.mark.parametrize(
    ("incomplete", "found"),
    [
        ("torchvision:resnet1", ["torchvision:resnet101", "torchvision:resnet152", "torchvision:resnet18"]),
        ("timm:vit_gigantic_patch14_r", []),
        ("timm:vit_gigantic_patch14_2", ["timm:vit_gigantic_patch14_224"]),
        ("tim", ["timm:"]),
        ("unknown:a", []),
        ("", []),
    ],
)
def test_names_of_libraries_are_completed(incomplete: str, found: list[str]) -> None:
    assert [name for name in sources(incomplete) if "clip" not in name] == found


def test_names_that_are_completed_are_models() -> None:
    import torchvision

    assert [name.partition(":")[2] for name in sources("torchvision:")] == sorted(torchvision.models.list_models())


@pytest.mark.parametrize(
    ("option", "values"),
    [("pattern", PATTERNS), ("init", INITS), ("granularity", get_args(Granularity))],
)
def test_values_of_options_are_completed_without_torch(option: str, values: tuple[str, ...]) -> None:
    words = {"COMP_WORDS": f"fxcollab transform x --{option} ", "COMP_CWORD": "4"}
    result = python("-c", WITHOUT_TORCH, _FXCOLLAB_COMPLETE="complete_bash", **words)
    assert tuple(result.stdout.split()) == values
    assert result.stderr.endswith("imported: []"), result.stderr


def test_auto_takes_its_budgets_in_every_command(call: Call, model: Path) -> None:
    for command in PLANNED:
        result = call(command, "model.py", "--splits", "auto", "--max-memory", "0.5x", "--input", "2x3")
        assert result.code == 2 and "A budget of 0.5x the memory can't be kept." in result.err


def test_a_tree_and_its_splits_are_chosen_within_a_size(call: Call, model: Path) -> None:
    options = ("--splits", "auto", "--fanouts", "auto", "--max-memory", "1GB", "--input", "2x3")
    costs = call("costs", "model.py", *options, "--json")
    assert costs.code == 0, costs.err
    result = call("transform", "model.py", *options)
    assert result.code == 0 and "heads;" in result.out, result.out


# A directory in the place of a source.


def test_the_splits_of_a_directory_are_those_of_its_source_at_its_inputs(call: Call, model: Path) -> None:
    assert call("transform", "model.py", "--splits", "stem", "--input", "7x3").code == 0
    of_source = call("splits", "model.py", "--input", "7x3", "--json")
    assert call("splits", "model_collab", "--json").json == of_source.json
    assert call("splits", "model_collab", "--input", "5x3", "--json").json[0]["shape"] == [5, 4]


def test_the_costs_of_a_directory_are_those_of_its_plan(call: Call, model: Path) -> None:
    plan = ("--pattern", "simple", "--heads", "3", "--splits", "stem", "--input", "7x3", "--model-arg", "width=6")
    assert call("transform", "model.py", *plan).code == 0
    assert call("costs", "model_collab", "--json").json == call("costs", "model.py", *plan, "--json").json
    refused = call("costs", "model_collab", "--heads", "2")
    assert refused.code == 2 and "--heads can't be given with a directory." in refused.err


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ((), {}),
        (("--seed", "3"), {"seed": 3}),
        (("--fanouts", "2,3"), {"fanouts": [2, 3]}),
        (("--splits", "stem"), {"splits": ["stem"], "fanouts": [2]}),
        (("--pattern", "multi-instance"), {"pattern": "multi-instance", "splits": [], "fanouts": [2]}),
        (("--rescale",), {"rescale": True}),
    ],
)
def test_a_directory_is_transformed_again_with_its_plan_but_for_what_is_given(
    call: Call, model: Path, options: tuple[str, ...], changed: dict[str, object]
) -> None:
    plan = ("--fanouts", "3,2", "--no-rescale", "--peers", "others", "--model-arg", "width=6", "--input", "7x3")
    assert call("transform", "model.py", "--splits", "stem,body.1", *plan).code == 0
    result = call("transform", "model_collab", "-o", "other", *options)
    assert result.code == 0, result.err
    before, after = (json.loads(Path(name, "plan.json").read_text()) for name in ("model_collab", "other"))
    kept = before.keys() - {"fingerprint", "torch", "fxcollab", "weights", "checksum", "signature"}
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept} | changed
    assert call("verify", "other").code == 0


@pytest.mark.parametrize(
    "options",
    [("--pattern", "ladder", "--splits", "stem,body.1"), ("--pattern", "simple", "--splits", "stem", "--heads", "3"),
     ("--pattern", "multi-instance", "--heads", "3"), ("--splits", "stem,body.1", "--fanouts", "2,2:1")],
)  # fmt: skip
def test_a_directory_of_any_pattern_is_transformed_again_to_the_same_tree(
    call: Call, model: Path, options: tuple[str, ...]
) -> None:
    assert call("transform", "model.py", *options).code == 0
    assert call("transform", "model_collab", "-o", "other").code == 0
    before, after = (json.loads(Path(name, "plan.json").read_text()) for name in ("model_collab", "other"))
    assert [after[key] for key in ("pattern", "splits", "fanouts")] == [
        before[key] for key in ("pattern", "splits", "fanouts")
    ]


def test_a_guard_of_a_file_names_the_file_each_time_it_is_loaded(call: Call, write: Write) -> None:
    write("""
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

            def forward(self, x):
                return self.head(self.stem(x)) * (2 if x.dim() == 3 else 1)
    """)
    assert call("transform", "model.py", "--splits", "stem", "--input", "2x3").code == 0
    assert call("transform", "model.py", "--splits", "stem", "--input", "2x3", "-o", "other").code == 0
    code = Path("model_collab/graph.py").read_text()
    assert "model.py:" in code and code == Path("other/graph.py").read_text()


def test_a_directory_is_replaced_by_its_own_transform_with_force_only(call: Call, made: Path) -> None:
    assert "The output directory exists." in call("transform", made).err
    result = call("transform", made, "--splits", "stem", "--force")
    assert (result.code, result.err.splitlines()[-1][:20]) == (0, "wrote model_collab/,")


def test_what_a_plan_fixes_stays_fixed_in_another_transform(call: Call, write: Write) -> None:
    write(NET.replace("forward(self, x)", "forward(self, x, double=True)").replace("return", "x = x * 2; return"))
    train_model = fxcollab.transform(
        load_source(Source.parse("model.py")).factory,
        splits=["stem"],
        example_inputs={"x": torch.randn(2, 3), "double": False},
        source=Source.parse("model.py"),
    )
    fxcollab.save(train_model, "made")
    for options in ((), ("--input", "4x3")):
        assert call("transform", "made", "-o", "other", "--force", *options).code == 0
        assert json.loads(Path("other/plan.json").read_text())["fixed"] == {"double": False}


def test_a_directory_whose_plan_names_no_source_says_so(call: Call) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    fxcollab.save(fxcollab.transform(model, splits=["0"]), "made")
    for command in ("costs", "splits", "transform"):
        result = call(command, "made", *(("-o", "other") if command == "transform" else ()))
        assert result.code == 2 and "The plan doesn't say where the model comes from." in result.err


def test_neither_a_source_nor_a_directory_is_answered_with_both(call: Call) -> None:
    for command in (*PLANNED, "splits"):
        result = call(command, "model_colab")
        assert result.code == 2 and "is not a source, and there is no such directory" in result.err
        assert "or a directory that transform wrote" in result.err


def test_paths_are_shown_as_they_are(call: Call, made: Path) -> None:
    wrote = "13 tensors of head 0, in the format of safetensors\n"
    assert call("prune", made, "-o", "x[bold].st").err == f"wrote x[bold].st: {wrote}"
    Path("x[").mkdir()
    assert call("prune", made, "-o", "x[/y].st").err == f"wrote x[/y].st: {wrote}"
    assert call("diff", made, "-o", "x[:smile:].json").err == "wrote x[:smile:].json\n"


# Splits that are chosen.


def test_splits_are_chosen_on_request_and_explained(call: Call, model: Path) -> None:
    result = call("transform", "model.py", "--splits", "auto", "--input", "2x3")
    assert result.code == 0
    lines = result.out.splitlines()
    assert re.fullmatch(r"splits      \S+, \S+: .*levels do .* % of the work \(evenness \d\.\d\d.*", lines[0])
    others = [line for line in lines if line.startswith("  not       ")]
    assert others and all("x the time, " in line for line in others)
    chosen = lines[0].removeprefix("splits").partition(":")[0].strip().split(", ")
    assert json.loads(Path("model_collab/plan.json").read_text())["splits"] == chosen


def test_a_choice_is_data_with_json(call: Call, model: Path) -> None:
    data = json.loads(call("transform", "model.py", "--splits", "auto", "--max-time", "2x", "--json").out)
    choice = data["choice"]
    assert choice["time"] <= 2 and sum(choice["shares"]) == pytest.approx(1)
    assert choice["costs"] == data["costs"]
    assert choice["runners_up"][0]["why"]


def test_costs_are_told_before_anything_is_built(call: Call, model: Path) -> None:
    result = call("costs", "model.py", "--splits", "stem,body.1")
    assert (result.code, result.err) == (0, "")
    first, *lines = result.out.splitlines()
    assert first == "input       guessed: set --input"
    assert [line.split()[0] for line in lines] == ["FLOPs", "parameters", "activations", "memory"]
    assert result.out.endswith(f"{fxcollab.training_costs(net(), splits=['stem', 'body.1'])}\n")
    assert "400 -> 896  (2.24x)" in result.out and "59 -> 122  (2.07x)" in result.out
    assert not Path("model_collab").exists()
    data = json.loads(call("costs", "model.py", "--splits", "auto", "--optimizer", "2", "--json").out)
    assert data["choice"]["costs"] == {key: data[key] for key in ("original", "training", "ratios")}


# The difference.


def test_the_difference_of_a_source_and_of_a_directory_are_the_same(call: Call, made: Path) -> None:
    of_source = call("diff", "model.py", "--splits", "stem,body.1")
    of_directory = call("diff", str(made))
    assert of_source.code == of_directory.code == 0
    assert of_source.out == of_directory.out
    assert of_source.out.splitlines()[-1] == "+ 9 cloned  ~ 3 rescaled  > 4 rewired  = 7 of the original"
    assert "├── b0  heads 0 to 1" in of_source.out


def test_the_difference_is_written_in_other_formats(call: Call, made: Path) -> None:
    result = call("diff", str(made), "-o", "graph.dot", "-o", "graph.json")
    assert (result.code, result.out) == (0, "")
    assert Path("graph.dot").read_text().startswith("digraph fxcollab {")
    assert json.loads(Path("graph.json").read_text())["heads"] == 4
    assert call("diff", str(made), "--json").out.strip() == Path("graph.json").read_text().strip()


def test_an_output_that_is_given_twice_is_refused_before_anything_is_written(call: Call, made: Path) -> None:
    result = call("diff", str(made), "-o", "diff.svg", "-o", "./diff.svg")
    assert result.code == 2 and "An output is given twice." in result.err and not Path("diff.svg").exists()


def test_a_difference_takes_its_plan_from_the_directory(call: Call, made: Path) -> None:
    result = call("diff", str(made), "--splits", "stem")
    assert result.code == 2 and "--splits can't be given with a directory." in result.err


@needs_a_font
def test_files_are_written_as_their_endings_say(call: Call, made: Path) -> None:
    result = call("diff", str(made), "-o", "diff.png", "-o", "diff.html", "--prove")
    assert result.code == 0 and result.out == ""
    assert Path("diff.png").read_bytes().startswith(b"\x89PNG") and "proved" not in result.err
    assert '"checks"' in Path("diff.html").read_text()


def test_an_unknown_ending_is_refused_before_anything_is_done(call: Call, made: Path) -> None:
    result = call("diff", str(made), "-o", "diff.svg", "-o", "diff.pdf")
    assert result.code == 2 and "There is no view of a difference for 'diff.pdf'" in result.err
    assert not Path("diff.svg").exists()


def test_a_directory_and_its_model_belong_together_and_another_model_does_not(call: Call, made: Path) -> None:
    assert call("diff", str(made), "model.py").code == 0
    result = call("diff", str(made), "torchvision:resnet18")
    assert result.code == 2
    assert "The two graphs have hardly a node in common." in result.err and "hint:" in result.err


def test_two_directories_are_compared(call: Call, made: Path) -> None:
    assert call("transform", "model.py", "--splits", "stem", "-o", "other").code == 0
    result = call("diff", str(made), "other")
    assert result.code == 0
    assert result.out.splitlines()[0].startswith("A  Net: training graph, 4 heads, hierarchical")
    assert result.out.splitlines()[1].startswith("B  Net: training graph, 2 heads, hierarchical")
    assert "1 of " in result.out and "removed" in result.out.splitlines()[-1]
    assert json.loads(call("diff", str(made), "other", "--json").out)["counts"]["removed"] > 0
    assert "= stem" in call("diff", str(made), "other", "--all").out
    assert call("diff", str(made), "other", "-o", "two.html", "-o", "two.svg").code == 0
    assert "A against B" in Path("two.html").read_text() and "A against B" in Path("two.svg").read_text()
    refused = call("diff", str(made), "other", "--prove")
    assert refused.code == 2 and "--prove is for a training graph beside its inference graph" in refused.err
    assert "can't be drawn as .dot" in call("diff", str(made), "other", "-o", "two.dot").err


def test_a_missing_folder_is_told_before_anything_is_done(call: Call, made: Path) -> None:
    result = call("diff", str(made), "-o", "diff.svg", "-o", "nowhere/diff.html")
    assert result.code == 2 and "there is no folder nowhere" in result.err and not Path("diff.svg").exists()


def test_a_difference_replaces_a_file_with_force_only_and_never_that_of_others(call: Call, made: Path) -> None:
    assert call("diff", made, "-o", "diff.json").code == 0
    before = Path("diff.json").read_text()
    refused = call("diff", made, "-o", "diff.json", "--eval")
    assert refused.code == 2 and "The output file exists." in refused.err and Path("diff.json").read_text() == before
    assert call("diff", made, "-o", "diff.json", "--eval", "--force").code == 0
    assert json.loads(Path("diff.json").read_text())["mode"] == "eval"
    plan = (made / "plan.json").read_text()
    refused = call("diff", made, "-o", made / "plan.json", "--force")
    assert refused.code == 2 and "The output is not replaced.\n  where: model_collab/plan.json" in refused.err
    assert (made / "plan.json").read_text() == plan


def test_a_png_without_the_extra_names_it(call: Call, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    result = call("diff", made, "-o", "diff.png")
    assert result.code == 2 and "hint: pip install 'fxcollab[png]'" in result.err and not Path("diff.png").exists()


def test_modules_that_start_fresh_are_named_on_the_command_line(call: Call, model: Path) -> None:
    result = call("transform", "model.py", "--splits", "stem", "--init", "copy", "--fresh", "head", "--input", "2x3")
    refused = call("transform", "model.py", "--splits", "stem", "--init", "copy", "--fresh", "tail", "--force")
    assert refused.code == 2 and "matches 'tail'" in refused.err
    assert result.code == 0, result.err
    plan = json.loads(Path("model_collab/plan.json").read_text())
    assert plan["init"] == "head=fresh,*=copy" and plan["eval_output"] == "head"
    again = call("transform", "model_collab", "-o", "again", "--seed", "1")
    assert again.code == 0 and json.loads(Path("again/plan.json").read_text())["init"] == plan["init"]
