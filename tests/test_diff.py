"""The difference between training and inference graph: its model, and its views in text."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import fxcollab
from fxcollab import Diff, DiffError, StateError
from fxcollab.diffs.terminal import view
from fxcollab.diffs.views import VIEWS
from fxcollab.errors import OutputError
from fxcollab.io.recognise import is_generated
from samples.networks import resnet_cifar
from tests.fonts import needs_a_font


class Net(nn.Module):
    """Three stages, the second an opened one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)))


def diff_of(*splits: str, model: Callable[[], nn.Module] = Net, **options: Any) -> Diff:
    return fxcollab.diff(fxcollab.transform(model(), splits=splits, seed=0, **options))


def test_nodes_without_what_was_added_are_the_inference_graph() -> None:
    train_model = fxcollab.transform(Net(), splits=["stem", "body.1"], seed=0)
    diff = fxcollab.diff(train_model)
    kept = [node.name for node in diff.nodes if node.in_inference]
    assert kept == [node.name for node in fxcollab.prune(train_model).graph.nodes]
    assert [node.name for node in diff.nodes] == [node.name for node in train_model.graph.nodes]


def test_every_instance_has_its_counterpart_branch_and_parameters() -> None:
    diff = diff_of("stem", "body.1")
    assert [node.name for node in diff.instances["head"]] == ["head", "head_b0_1", "head_b1_0", "head_b1_1"]
    clone = diff.by_name["body_0_b1"]
    assert (clone.change, clone.counterpart, clone.branch, clone.target) == ("cloned", "body_0", "b1", "body.0")
    assert (clone.label, clone.module, clone.parameters, clone.shape) == ("Linear", "body", 20, (2, 4))
    assert clone.flops == 2 * 2 * 4 * 4


def test_a_rescale_says_what_it_scales_and_by_how_much() -> None:
    diff = diff_of("stem", "body.1", fanouts=(2, 3))
    scaled = {node.origin: node.factor for node in diff.nodes if node.change == "rescaled"}
    assert scaled == {"stem": 0.5, "body_1": 1 / 3}
    assert all(node.counterpart is None for node in diff.nodes if node.change == "rescaled")


def test_a_copy_before_a_write_is_shown_as_one() -> None:
    assert diff_of("body.0").count("copied") == 2


def test_counts_are_those_of_the_summary() -> None:
    train_model = fxcollab.transform(resnet_cifar(8), splits=["stage1", "stage2"], seed=0)
    diff, summary = fxcollab.diff(train_model), fxcollab.summarise(train_model)
    assert (diff.count("cloned"), diff.count("rescaled")) == (summary.cloned, summary.rescaled)
    assert sum(node.new_parameters for node in diff.nodes) == summary.parameters[1]


class Auxiliary(Net):
    """A second output in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.body(self.stem(x))
        return (self.head(y), self.auxiliary(y)) if self.training else self.head(y)


def test_either_modes_graph_can_be_shown() -> None:
    train_model = fxcollab.transform(Auxiliary(), splits=["body"], seed=0)
    train, evaluation = fxcollab.diff(train_model), fxcollab.diff(train_model, training=False)
    assert "auxiliary" in train.by_name and "auxiliary" not in evaluation.by_name
    assert train.nodes[1].shape and evaluation.nodes[1].shape is None and evaluation.unknown


def test_shapes_that_cannot_be_counted_say_why() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return super().forward(x + y.view(5, -1)[0, 0])  # no usual shape

    diff = diff_of("body", model=Two)
    assert diff.inputs is None and diff.unknown == "its inputs are x, y"
    assert all(node.shape is None for node in diff.nodes)


# Views.


def test_the_terminal_shows_the_head_tree_in_eighty_columns() -> None:
    shown = str(diff_of("stem", "body.1"))
    assert (
        shown
        == """\
hierarchical, 4 heads, train mode
trunk
= x, stem  16 parameters
~ rescale: the gradient of stem times 0.5
├── b0  heads 0 to 1
│   = body_0, body_1  20 parameters
│   ~ rescale_1: the gradient of body_1 times 0.5
│   ├── b0_0  head 0
│   │   = body_2, head  30 parameters
│   └── b0_1  head 1
│       + body_2, head  30 parameters
└── b1  heads 2 to 3
    + body_0, body_1  20 parameters
    ~ rescale_1_b1: the gradient of body_1 times 0.5
    ├── b1_0  head 2
    │   + body_2, head  30 parameters
    └── b1_1  head 3
        + body_2, head  30 parameters
= original  + another head's instance  ~ gradient scaled  ! copy before a write
+ 8 cloned  ~ 3 rescaled  > 3 rewired  = 6 of the original
"""
    )


def test_long_runs_are_folded_unless_asked() -> None:
    diff = diff_of("7", model=lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))))
    assert "= input_1, _0, _1 ... 5 more ... _7  160 parameters" in str(diff)
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(view(diff, unfolded=True))
    assert "more ..." not in captured.get() and captured.get().count("Linear") == 8 + 2


def test_json_is_versioned_complete_and_the_same_twice() -> None:
    one, other = (diff_of("stem", "body.1").to_json() for _ in range(2))
    assert one == other
    data = json.loads(one)
    assert data["format"] == 1 and data["heads"] == 4
    assert [node["name"] for node in data["nodes"]] == [node.name for node in diff_of("stem", "body.1").nodes]
    assert data["counts"] == {"original": 6, "cloned": 8, "rescaled": 3, "copied": 0, "state": 0, "rewired": 3}


class Hostile(nn.Module):
    """Names that are markup elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("<script>alert('x')</script>", nn.Linear(3, 3))
        self.add_module("😀" * 100, nn.Linear(3, 3))
        self.add_module('quo"ted \\ and\nbroken \x1b[31m', nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Any:
        for layer in self._modules.values():
            assert layer is not None
            x = layer(x)
        return x


def test_hostile_names_are_text_in_every_view() -> None:
    diff = diff_of("<script>alert('x')</script>", model=Hostile)
    for line in diff.to_dot().splitlines():
        assert line.replace('\\"', "").count('"') % 2 == 0
    assert "alert" in json.loads(diff.to_json())["splits"][0] and str(diff)


def test_dot_has_a_cluster_a_branch_and_all_edges() -> None:
    diff = diff_of("stem", "body.1")
    dot = diff.to_dot()
    assert dot.count("subgraph") == 2 + 4
    assert dot.count(" -> ") == sum(len(node.inputs) for node in diff.nodes)
    assert 'label="rescale\\ngradient x 0.5"' in dot


# What has no difference.


@pytest.mark.parametrize("make", [Net, lambda: torch.fx.symbolic_trace(Net())], ids=["module", "traced"])
def test_what_was_not_transformed_is_refused(make: Any) -> None:
    with pytest.raises(StateError, match="is not a training model"):
        fxcollab.diff(make())


def test_a_node_that_another_pass_added_is_shown_in_the_branch_of_what_it_reads() -> None:
    train_model = fxcollab.transform(Net(), splits=["stem"], seed=0)
    read = next(node for node in train_model.graph.nodes if node.name == "body_b1")
    with train_model.graph.inserting_after(read):
        added = train_model.graph.call_function(torch.relu, (read,))
    shown = fxcollab.diff(train_model).by_name[added.name]
    assert (shown.change, shown.branch, shown.inputs) == ("cloned", "b1", ("body_b1",))


def test_hostile_names_are_called_by_the_generated_code_as_well() -> None:
    model = Hostile()
    train_model = fxcollab.transform(model, splits=["<script>alert('x')</script>"], seed=0)
    assert fxcollab.verify(model, train_model, (torch.randn(2, 3),))
    assert 'getattr(self, "quo\\"ted' in train_model.code


# Files.


@needs_a_font
def test_a_files_ending_names_the_view(tmp_path: Path) -> None:
    diff = diff_of("stem")
    starts = {
        ".html": b"<!doctype html>",
        ".svg": b"<svg",
        ".png": b"\x89PNG",
        ".json": b"{",
        ".dot": b"digraph",
    }
    assert set(starts) == set(VIEWS)
    for ending, start in starts.items():
        diff.save(tmp_path / f"diff{ending}")
        assert (tmp_path / f"diff{ending}").read_bytes().startswith(start)


@pytest.mark.parametrize("ending", [pytest.param(e, marks=[needs_a_font] * (e == ".png")) for e in VIEWS])
def test_a_written_file_can_be_told_from_those_of_others(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"diff{ending}"
    assert not is_generated(file)
    diff_of("stem").save(file)
    assert is_generated(file) and not is_generated(tmp_path)
    made = file.read_bytes()
    for changed in (b"mine", made + b"mine", b"mine" + made, made[:80] + b"mine" + made[80:], made):
        file.write_bytes(changed)
        assert is_generated(file) is (changed == made), changed[-200:]


def test_no_plan_is_taken_for_a_difference(tmp_path: Path) -> None:
    fxcollab.save(fxcollab.transform(Net, splits=["stem"], seed=0), tmp_path / "made")
    assert not is_generated(tmp_path / "made" / "plan.json")


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "diff.json"
    diff_of("stem").save(file)
    before = file.read_bytes()

    def full(path: Path, data: bytes) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="no space"):
        diff_of("stem", "body.1").save(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_report_is_shown_on_the_page(tmp_path: Path) -> None:
    train_model = fxcollab.transform(Net(), splits=["stem"], seed=0)
    report = fxcollab.verify(train_model.root, train_model, (torch.randn(2, 3),))
    fxcollab.diff(train_model).save(tmp_path / "diff.html", report)
    assert '"checks":[["' in (tmp_path / "diff.html").read_text()


def test_an_unknown_ending_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for name, told in (
        ("diff.htm", "did you mean .html"),
        ("diff.pdf", "known are .html, .svg"),
        ("diff.mmd", "known are .html, .svg"),
        ("diff", "no ending"),
    ):
        with pytest.raises(DiffError) as refused:
            diff_of("stem").save(tmp_path / name)
        assert told in str(refused.value)
    assert not list(tmp_path.iterdir())


# Two models.


class Other(nn.Module):
    """Nothing of it is called as in the other one."""

    def forward(self, x: Tensor) -> Any:
        return x.relu()


def test_what_belongs_together_is_accepted() -> None:
    train_model = fxcollab.transform(Net(), splits=["stem", "body.1"], seed=0)
    same = fxcollab.diff(train_model)
    for other in (fxcollab.prune(train_model, 2), train_model.root, Net()):
        assert fxcollab.diff(train_model, other) == same


@pytest.mark.parametrize(
    ("other", "why"),
    [(lambda: nn.Linear(3, 2), "the forward of Linear takes no 'x'"), (Other, "hardly a node in common")],
    ids=["part", "other"],
)
def test_two_unrelated_models_have_no_difference(other: Any, why: str) -> None:
    train_model = fxcollab.transform(Net(), splits=["stem"], seed=0)
    with pytest.raises(DiffError) as refused:
        fxcollab.diff(train_model, other())
    assert why in str(refused.value) and "hint:" in str(refused.value)


# Notebooks.


def test_a_notebook_shows_the_picture_and_below_it_the_page() -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    with capture_output() as captured:
        shell.display_formatter.format(diff_of("stem"))
    picture, page = (output.data for output in captured.outputs)
    assert picture["image/svg+xml"].startswith("<svg") and "<script" not in picture["image/svg+xml"]
    assert "<iframe srcdoc=" in page["text/html"] and "&lt;script" in page["text/html"]


def test_imports_between_the_files_of_the_difference_run_one_way() -> None:
    folder = Path(fxcollab.diffs.__file__).parent
    files = {f"fxcollab.diffs.{file.stem}": ast.parse(file.read_text()) for file in folder.glob("*.py")}
    found = [
        (name, node.module)
        for name, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    ]
    assert nx.is_directed_acyclic_graph(nx.DiGraph([(name, other) for name, other in found if other in files]))
