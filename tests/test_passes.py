"""The passes: a list that can be read, run, printed and extended; graphs that other passes edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.testing import assert_close

import fxcollab
from fxcollab import ArtifactError, CaptureError, CollabGraphModule, FxCollabError, HeadTree, PatternError, StateError
from fxcollab.analysis.partition import LEVEL_KEY
from fxcollab.fx_utils import copy_graph, first_difference
from fxcollab.passes import (
    CapturePass,
    CodegenPass,
    PartitionPass,
    Pass,
    RewritePass,
    Stage,
    run_passes,
    training_passes,
)
from fxcollab.plan import plan_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """An activation behind the first split, and one in front of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(torch.relu(self.body(self.stem(x)))))


def made(splits: tuple[str, ...] = ("stem",)) -> tuple[Net, CollabGraphModule]:
    torch.manual_seed(0)
    model = Net()
    return model, fxcollab.transform(model, splits=splits, seed=0)


def replaced(graph: fx.Graph, old: Callable[..., Tensor], new: Callable[..., Tensor]) -> int:
    """Another function for every call of ``old``, as a pass that knows nothing of heads would put it."""
    calls = [node for node in graph.nodes if node.target is old]
    for node in calls:
        with graph.inserting_after(node):
            node.replace_all_uses_with(graph.call_function(new, node.args))
        graph.erase_node(node)
    return len(calls)


# --------------------------------------------------------------------------------------- the passes by themselves


def test_the_public_passes_make_what_transform_makes() -> None:
    model, transformed = made(("stem", "body"))
    captured = fxcollab.capture(model, ["stem", "body"])
    cut = fxcollab.partition(captured, HeadTree(("stem", "body"), (2, 2)))
    train_model = fxcollab.rewrite(captured, cut, seed=0)
    assert first_difference(train_model.graph, transformed.graph) is None
    assert train_model.code == transformed.code
    assert plan_of(train_model) == plan_of(transformed)
    for name, value in transformed.state_dict().items():
        assert torch.equal(train_model.state_dict()[name], value), name


@pytest.mark.parametrize("splits", [(), ("stem",), ("stem", "body")], ids=["instances", "simple", "hierarchical"])
def test_what_the_public_passes_make_is_a_training_model_in_full(splits: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    captured = fxcollab.capture(model, splits)
    cut = fxcollab.partition(captured, HeadTree(splits, (2,) * max(1, len(splits))))
    train_model = fxcollab.rewrite(captured, cut)
    assert fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert torch.equal(fxcollab.prune(train_model)(X), model(X))
    assert fxcollab.diff(train_model).count("cloned") == fxcollab.summarise(train_model).cloned > 0
    fxcollab.save(train_model, tmp_path / "saved")
    loaded = fxcollab.load(tmp_path / "saved", Net)
    assert all(torch.equal(*both) for both in zip(loaded(X), train_model(X), strict=True))


def test_each_pass_can_be_run_and_printed_alone() -> None:
    stage = CapturePass(("stem",))(Stage(Net()))
    assert "self.stem" in stage.graph_module.code and "peers" not in stage.graph_module.code
    stage = PartitionPass(HeadTree(("stem",), (2,)))(stage)
    levels = {node.name: node.meta[LEVEL_KEY] for node in stage.graph_module.graph.nodes}
    assert levels == {"x": 0, "stem": 0, "body": 1, "relu": 1, "head": 1, "tanh": 1, "output": 1}
    stage = RewritePass()(stage)
    assert "body_b1" in str(stage.graph_module.graph)
    assert "self.peers.b1.body" in CodegenPass()(stage).graph_module.code


def test_after_pass_sees_every_pass_and_its_graph() -> None:
    seen: list[tuple[str, int]] = []
    fxcollab.transform(
        Net(), splits=["stem"], seed=0, after_pass=lambda name, module: seen.append((name, len(module.graph.nodes)))
    )
    assert seen == [("capture", 7), ("partition", 7), ("rewrite", 12), ("codegen", 12)]


def test_a_graph_that_a_pass_leaves_broken_is_noticed_behind_that_pass() -> None:
    def forget(name: str, module: fx.GraphModule) -> None:
        seen.append(name)

    @dataclass(frozen=True)
    class Breaks:
        name: str = "breaks"

        def __call__(self, stage: Stage) -> Stage:
            body, relu = (node for node in stage.graph_module.graph.nodes if node.name in ("body", "relu"))
            relu.append(body)
            return stage

    seen: list[str] = []
    passes = training_passes(HeadTree(("stem",), (2,)))
    passes.insert(1, Breaks())
    with pytest.raises(RuntimeError, match="used before"):
        run_passes(passes, Net(), forget)
    assert seen == ["capture"]


@pytest.mark.parametrize(
    ("passes", "error", "hint"),
    [
        ([PartitionPass(HeadTree(("stem",), (2,)))], CaptureError, "CapturePass"),
        ([CapturePass(), RewritePass()], PatternError, "PartitionPass"),
    ],
    ids=["no capture", "no partition"],
)
def test_a_list_that_lacks_a_pass_says_which(passes: list[object], error: type[Exception], hint: str) -> None:
    with pytest.raises(error) as caught:
        run_passes(passes, Net())  # type: ignore[arg-type]
    assert hint in str(caught.value.hint)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Smooth:
    """Between partition and rewrite: another activation for all heads at once; levels are found anew."""

    tree: HeadTree
    name: str = "smooth"

    def __call__(self, stage: Stage) -> Stage:
        replaced(stage.graph_module.graph, torch.relu, F.gelu)
        return replace(stage, partition=fxcollab.partition(stage.graph_module, self.tree))


def test_a_pass_that_returns_nothing_is_named() -> None:
    @dataclass(frozen=True)
    class Counts:
        name: str = "counts"

        def __call__(self, stage: Stage) -> None:
            len(stage.graph_module.graph.nodes)

    passes: list[Any] = training_passes(HeadTree(("stem",), (2,)))
    passes.insert(2, Counts())
    with pytest.raises(FxCollabError, match="Pass 'counts' returned a NoneType"):
        run_passes(passes, Net())


def test_a_pass_of_ones_own_between_partition_and_rewrite() -> None:
    tree = HeadTree(("stem",), (3,))
    passes = training_passes(tree)
    passes.insert(2, Smooth(tree))
    graphs: dict[str, str] = {}
    train_model = run_passes(passes, Net(), lambda name, module: graphs.setdefault(name, str(module.graph)))
    assert list(graphs) == ["capture", "partition", "smooth", "rewrite", "codegen"]
    assert "relu" in graphs["partition"] and "gelu" in graphs["smooth"] and "relu" not in graphs["smooth"]
    assert train_model.code.count("gelu(") == 4  # three heads, and eval mode's one
    pruned = fxcollab.prune(train_model, head=2)
    assert torch.equal(pruned(X), train_model(X)[2])


@dataclass(frozen=True)
class Adds:
    """Between partition and rewrite, without looking for the levels again."""

    name: str = "adds"

    def __call__(self, stage: Stage) -> Stage:
        relu = next(node for node in stage.graph_module.graph.nodes if node.name == "relu")
        with stage.graph_module.graph.inserting_after(relu):
            added = stage.graph_module.graph.call_function(torch.neg, (relu,))
        relu.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        return stage


@dataclass(frozen=True)
class Copies:
    """Puts another graph, equal to the captured one, in its place."""

    name: str = "copies"

    def __call__(self, stage: Stage) -> Stage:
        stage.graph_module.graph = copy_graph(stage.graph_module.graph)
        return stage


@pytest.mark.parametrize(("edit", "node"), [(Adds(), "neg"), (Copies(), "body")], ids=["nodes", "graph"])
def test_an_edit_after_the_partition_is_refused_unless_it_is_found_anew(edit: Pass, node: str) -> None:
    passes = training_passes(HeadTree(("stem",), (2,)))
    passes.insert(2, edit)
    with pytest.raises(PatternError, match=rf"(?s)edited after it was partitioned.*'{node}'"):
        run_passes(passes, Net())


@pytest.mark.parametrize("edit", ["calls", "reads"])
def test_what_nodes_call_and_read_after_the_partition_is_noticed(edit: str) -> None:
    def look(name: str, module: fx.GraphModule) -> None:
        relu = next(node for node in module.graph.nodes if node.name == "relu")
        if name == "partition" and edit == "calls":
            relu.target = torch.relu_  # which writes, unseen
        elif name == "partition":
            relu.args = (next(iter(module.graph.nodes)),)

    with pytest.raises(PatternError, match="edited after it was partitioned"):
        fxcollab.transform(Net(), splits=["stem"], after_pass=look)


def test_the_code_runs_branch_by_branch_depth_first() -> None:
    _, train_model = made(("stem", "body"))
    calls = [str(node.target) for node in train_model.graph.nodes if node.op == "call_module"]
    assert calls == [
        "stem", "body", "head", "peers.b0_1.head", "peers.b1.body", "peers.b1_0.head", "peers.b1_1.head"
    ]  # fmt: skip


# ----------------------------------------------------------------------------------- graphs that others edited


@pytest.mark.parametrize("old", [torch.relu, torch.tanh], ids=["inside", "before the output"])
@pytest.mark.parametrize("splits", [("stem",), ("stem", "body")], ids=["simple", "hierarchical"])
def test_what_a_pass_replaced_in_every_head_prunes_and_shows(
    old: Callable[..., Tensor], splits: tuple[str, ...]
) -> None:
    _, train_model = made(splits)
    assert replaced(train_model.graph, old, F.silu) == len(train_model(X))
    train_model.recompile()
    outputs = train_model(X)
    for head, output in enumerate(outputs):
        pruned = fxcollab.prune(train_model, head)
        assert torch.equal(pruned(X), output)
        assert sum(node.target is F.silu for node in pruned.graph.nodes) == 1
        assert pruned.state_dict().keys() == Net().state_dict().keys()
    assert "silu" in str(fxcollab.diff(train_model))
    assert fxcollab.summarise(train_model).heads == len(outputs)


def a_target(graph: fx.Graph, node: fx.Node) -> None:
    node.target = torch.sigmoid


def a_method(graph: fx.Graph, node: fx.Node) -> None:
    node.op, node.target = "call_method", "sigmoid"


def the_node_with_its_meta(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        node.replace_all_uses_with(graph.call_function(torch.sigmoid, node.args), propagate_meta=True)
    graph.erase_node(node)


@pytest.mark.parametrize("replace_one", [a_target, a_method, the_node_with_its_meta])
def test_what_was_replaced_in_place_stays_so_when_pruned(replace_one: Callable[[fx.Graph, fx.Node], None]) -> None:
    _, train_model = made()
    for node in [node for node in train_model.graph.nodes if node.target is torch.relu]:
        replace_one(train_model.graph, node)
    train_model.recompile()
    for head, output in enumerate(train_model(X)):
        pruned = fxcollab.prune(train_model, head)
        assert "sigmoid" in pruned.code and "relu(" not in pruned.code
        assert torch.equal(pruned(X), output)


def test_an_added_write_stays_behind_what_its_branch_read_before() -> None:
    _, train_model = made()
    named = {node.name: node for node in train_model.graph.nodes}
    for branch in ("", "_b1"):
        with train_model.graph.inserting_after(named[f"head{branch}"]):
            train_model.graph.call_method("mul_", (named[f"relu{branch}"], 3))
    train_model.recompile()
    for head, output in enumerate(train_model(X)):
        assert torch.equal(fxcollab.prune(train_model, head)(X), output)


def test_a_node_added_to_one_head_is_pruned_with_that_head_alone() -> None:
    _, train_model = made()
    node = next(node for node in train_model.graph.nodes if node.name == "tanh_b1")
    with train_model.graph.inserting_after(node):
        added = train_model.graph.call_function(torch.neg, (node,))
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    train_model.recompile()
    counts = [len(fxcollab.prune(train_model, head).graph.nodes) for head in (0, 1)]
    assert counts == [7, 8]
    assert torch.equal(fxcollab.prune(train_model, 1)(X), train_model(X)[1])


def test_a_node_added_to_the_trunk_belongs_to_every_head() -> None:
    _, train_model = made()
    stem = next(node for node in train_model.graph.nodes if node.name == "stem")
    with train_model.graph.inserting_after(stem):
        added = train_model.graph.call_function(torch.sigmoid, (stem,))
    stem.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    train_model.recompile()
    for head, output in enumerate(train_model(X)):
        assert torch.equal(fxcollab.prune(train_model, head)(X), output)


def test_an_added_call_of_a_peers_module_is_the_originals_after_pruning() -> None:
    _, train_model = made()
    body = next(node for node in train_model.graph.nodes if node.name == "body_b1")
    with train_model.graph.inserting_after(body):
        again = train_model.graph.call_module("peers.b1.body", (body,))
    body.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    train_model.recompile()
    pruned = fxcollab.prune(train_model, 1)
    assert [node.target for node in pruned.graph.nodes if node.op == "call_module"] == [
        "stem",
        "body",
        "body",
        "head",
    ]
    assert torch.equal(pruned(X), train_model(X)[1])


@pytest.mark.parametrize("path", ["act", "body.act"])
def test_a_module_that_one_head_was_given_is_pruned_with_that_head(path: str) -> None:
    torch.manual_seed(0)
    model = Net()
    model.body = nn.Sequential(nn.Linear(4, 4))
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    parent, _, name = f"peers.b1.{path}".rpartition(".")
    setattr(train_model.get_submodule(parent), name, nn.PReLU(init=0.7))
    for graph in train_model.modes:
        relu = next(node for node in graph.nodes if node.name == "relu_b1")
        with graph.inserting_after(relu):
            added = graph.call_module(f"peers.b1.{path}", (relu,))
        relu.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
    train_model.recompile()
    pruned = fxcollab.prune(train_model, 1)
    assert torch.equal(pruned(X), train_model(X)[1]) and f"{path}.weight" in pruned.state_dict()
    assert fxcollab.prune(train_model).state_dict().keys() == model.state_dict().keys()


def insert_silu(stage_or_module: Stage | fx.GraphModule) -> None:
    module = stage_or_module.graph_module if isinstance(stage_or_module, Stage) else stage_or_module
    assert isinstance(module, CollabGraphModule)
    for graph in module.modes:
        replaced(graph, torch.relu, F.silu)


@dataclass(frozen=True)
class Silu:
    name: str = "silu"

    def __call__(self, stage: Stage) -> Stage:
        insert_silu(stage)
        return stage


@pytest.mark.parametrize("place", [1, 3, 4], ids=["after the capture", "after the rewrite", "last"])
def test_a_pass_has_an_effect_wherever_it_stands_and_its_graph_is_not_saved(place: int, tmp_path: Path) -> None:
    passes = training_passes(HeadTree(("stem",), (2,)))
    passes.insert(place, Silu())
    train_model = run_passes(passes, Net())
    assert "silu" in train_model.code and "relu" not in train_model.code
    assert torch.equal(fxcollab.prune(train_model, 1)(X), train_model(X)[1])
    with pytest.raises(ArtifactError, match="was edited"):
        fxcollab.save(train_model, tmp_path / "edited")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["capture", "codegen"])
def test_a_graph_that_was_edited_between_passes_is_not_saved(when: str, tmp_path: Path) -> None:
    def look(name: str, module: fx.GraphModule) -> None:
        if name == when:
            insert_silu(module)

    train_model = fxcollab.transform(Net(), splits=["stem"], after_pass=look)
    with pytest.raises(ArtifactError, match="was edited"):
        fxcollab.save(train_model, tmp_path / "edited")


@pytest.mark.parametrize("places", [("tanh", "tanh_b1"), ("relu", "head_b1")], ids=["outputs", "inside"])
def test_a_node_that_joins_heads_is_refused_with_its_name_and_the_reason(places: tuple[str, str]) -> None:
    _, train_model = made()
    named = {node.name: node for node in train_model.graph.nodes}
    with train_model.graph.inserting_before(named["output"]):
        train_model.graph.call_function(torch.add, tuple(named[place] for place in places))
    with pytest.raises(StateError, match=r"(?s)'add\w*' belongs to no head.*branches b0 and b1"):
        train_model.recompile()  # eval mode returns head 0
    for function in (fxcollab.prune, fxcollab.diff, fxcollab.summarise):
        with pytest.raises(StateError, match=r"(?s)'add\w*' belongs to no head.*branches b0 and b1"):
            function(train_model)


# ---------------------------------------------------------------------------------------- head trees of any shape


class Ladder(HeadTree):
    """Only head 0's branch splits again: a subclass that overrides nothing but the paths."""

    def paths(self, level: int):  # type: ignore[no-untyped-def]
        if level == 0:
            return iter([()])
        return ((*path, c) for path in self.paths(level - 1) for c in range(1 if any(path) else 2))


def separate(train_model: CollabGraphModule, head: int) -> nn.Sequential:
    single = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
    single.load_state_dict(fxcollab.prune_state_dict(train_model.state_dict(), head))
    return single


@pytest.mark.parametrize(
    "tree",
    [
        HeadTree(("0", "1"), (2, (2, 1))),
        HeadTree(("0", "1"), (3, (1, 3, 2))),
        HeadTree(("0", "1", "2"), (2, (1, 2), (3, 1, 1))),
        Ladder(("0", "1", "2"), (2, 2, 2)),
    ],
    ids=["2, 2:1", "3, 1:3:2", "2, 1:2, 3:1:1", "a ladder from outside"],
)
def test_gradients_in_a_tree_of_any_shape_are_the_mean_over_the_heads_behind(tree: HeadTree) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
    captured = fxcollab.capture(model, tree.splits)
    train_model = fxcollab.rewrite(captured, fxcollab.partition(captured, tree))
    x = X.double()
    outputs = train_model(x)
    sum(output.square().sum() for output in outputs).backward()
    alone = [separate(train_model, head) for head in range(len(outputs))]
    for single, output in zip(alone, outputs, strict=True):
        assert torch.equal(single(x), output)
        single(x).square().sum().backward()
    mean = torch.stack([single[0].weight.grad for single in alone]).mean(0)
    assert_close(model[0].weight.grad, mean, rtol=1e-13, atol=1e-15)
    assert fxcollab.verify(model, train_model, (x,)).raise_if_failed()
