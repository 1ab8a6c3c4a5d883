"""One graph against another: which nodes were added, removed, changed and rewired, counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

import fxcollab
from fxcollab import DiffError
from fxcollab.diffs.compare import Comparison
from fxcollab.diffs.comparison import Row, Status
from fxcollab.diffs.views import VIEWS
from fxcollab.io.recognise import is_generated
from tests.fonts import needs_a_font


class Net(nn.Module):
    """Four layers one behind the other, each a node."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.tail = nn.Tanh()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.body(self.stem(x))))


class Longer(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)


class Smooth(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.Tanh()


def compared(a: nn.Module, b: nn.Module, **options: Any) -> Comparison:
    found = fxcollab.diff(a, b, **options)
    assert isinstance(found, Comparison)
    return found


def counts(found: Comparison) -> dict[str, int]:
    """Those above zero, without what is the same."""
    statuses: tuple[Status, ...] = ("added", "removed", "changed", "rewired")
    return {status: found.count(status) for status in statuses if found.count(status)}


def named(found: Comparison, status: Status) -> list[str]:
    return [(row.b or row.a).name for row in found.rows if row.status == status]  # type: ignore[union-attr]


def simple(split: str, **options: Any) -> fxcollab.CollabGraphModule:
    return fxcollab.transform(Net(), "simple", [split], seed=0, **options)


def test_an_equal_plan_makes_no_difference() -> None:
    found = compared(simple("body"), simple("body"))
    assert counts(found) == {} and found.hunks == ()
    assert found.count("same") == 9, "x, stem, body, rescale, tail and head twice, output"


def test_another_seed_and_other_weights_make_no_difference() -> None:
    assert counts(compared(simple("body"), fxcollab.transform(Net(), "simple", ["body"], seed=7))) == {}


def test_a_split_moved_up_adds_a_clone_of_what_it_passed() -> None:
    found = compared(simple("body"), simple("stem"))
    # body becomes a clone for head 1; the rescale of body goes, one of stem comes, and their readers are rewired.
    assert named(found, "added") == ["rescale", "body_b1"]
    assert named(found, "removed") == ["rescale"]
    assert named(found, "rewired") == ["body", "tail", "tail_b1"]
    assert counts(found) == {"added": 2, "removed": 1, "rewired": 3}


def test_another_head_adds_its_branch() -> None:
    found = compared(simple("body"), simple("body", heads=3))
    assert named(found, "added") == ["tail_b2", "head_b2"]
    assert named(found, "changed") == ["rescale", "output"], "a third instead of a half"
    assert {row.a.branch for row in found.rows if row.a} == {"", "b0", "b1"}


def test_heads_of_a_tree_go_on_with_those_of_fewer_splits() -> None:
    tree = fxcollab.transform(Net(), "hierarchical", ["stem", "body"], seed=0)
    found = compared(simple("stem"), tree)
    by_name = {row.b.name: row.a.name for row in found.rows if row.a and row.b}
    assert by_name["tail_b1_0"] == "tail_b1" and by_name["head_b1_0"] == "head_b1"
    branches = [f"{layer}_b{path}" for path in ("0_1", "1_1") for layer in ("tail", "head")]
    assert sorted(named(found, "added")) == sorted(["rescale_1", "rescale_1_b1", *branches])
    assert named(found, "rewired") == ["tail", "tail_b1_0"]
    assert not any("opened in" in row.what for row in found.rows)  # whole modules in both


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_module_that_is_a_node_of_one_graph_alone_is_said_to_be_opened_in_the_other(side: str) -> None:
    def made(split: str) -> fxcollab.CollabGraphModule:
        block = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
        net = nn.Sequential(nn.Linear(3, 4), block, nn.Linear(4, 3), nn.Linear(3, 2))
        return fxcollab.transform(net, "simple", [split], seed=0)

    inside, outside = made("1.0"), made("0")
    found = compared(*((inside, outside) if side == "A" else (outside, inside)))
    told = {(row.b or row.a).name: row.what for row in found.rows if row.what.endswith(f", opened in {side}")}  # type: ignore[union-attr]
    assert told == dict.fromkeys(("_1", "_1_b1"), f"Sequential, opened in {side}")
    assert f"Sequential, opened in {side}" in str(found) and f"Sequential, opened in {side}" in found.to_json()


def test_a_pass_that_fuses_removes_rewires_and_changes() -> None:
    before = fx.symbolic_trace(conv_net().eval())
    found = compared(before, fuse(conv_net().eval()))
    assert [(row.status, (row.b or row.a).name) for hunk in found.hunks for row in hunk] == [  # type: ignore[union-attr]
        ("changed", "_0"),
        ("removed", "_1"),
        ("rewired", "_2"),
    ]
    [changed] = [row for row in found.rows if row.status == "changed"]
    assert changed.what == "Conv2d: bias=False -> nothing"
    [rewired] = [row for row in found.rows if row.status == "rewired"]
    assert rewired.what == "reads _1 -> _0"


def test_an_operation_put_into_a_captured_graph() -> None:
    before, after = fxcollab.capture(Net(), ["stem"]), fxcollab.capture(Net(), ["stem"])
    stem = next(node for node in after.graph.nodes if node.name == "stem")
    with after.graph.inserting_after(stem):
        new = after.graph.call_function(torch.tanh, (stem,))
        stem.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    after.recompile()
    found = compared(before, after)
    assert counts(found) == {"added": 1, "rewired": 1}
    assert [len(hunk) for hunk in found.hunks] == [2]
    back = compared(after, before)
    assert counts(back) == {"removed": 1, "rewired": 1}


class Blocks(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x))


class Repeats(nn.Module):
    def __init__(self, pick: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.pick, self.size = pick, nn.Linear(3, 3)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        return torch.cat(self.pick(p, self.size(q)))


@pytest.mark.parametrize("pick", [lambda p, q: [p, q, q], lambda p, q: [p, p, q]])
def test_values_read_twice_are_told_apart_by_their_places(pick: Callable[..., list[Tensor]]) -> None:
    a, b = (fx.symbolic_trace(Repeats(each)) for each in (lambda p, q: [p, q, p], pick))
    assert counts(compared(a, b)) == {"changed": 1}


def test_functions_of_one_name_are_told_apart() -> None:
    def graph(function: Callable[..., Tensor]) -> fx.GraphModule:
        made = fx.Graph()
        made.output(made.call_function(function, (made.placeholder("x"),)))
        return fx.GraphModule(nn.Module(), made)

    def adds() -> Callable[..., Tensor]:
        def same(x: Tensor) -> Tensor:
            return x + 1

        return same

    def doubles() -> Callable[..., Tensor]:
        def same(x: Tensor) -> Tensor:
            return x * 2

        return same

    with pytest.raises(DiffError):
        fxcollab.diff(graph(adds()), graph(doubles()))
    assert counts(compared(graph(adds()), graph(adds()))) == {}


def test_a_graph_that_does_nothing_is_equal_to_itself() -> None:
    assert counts(compared(fx.symbolic_trace(nn.Identity()), fx.symbolic_trace(nn.Identity()))) == {}


@pytest.mark.parametrize("more", [1, 3])
def test_an_exported_network_of_another_depth(more: int) -> None:
    shallow, deep = (torch.export.export(Blocks(depth), (torch.ones(2, 4),)).module() for depth in (2, 2 + more))
    found = compared(shallow, deep)
    # each block has weight, bias, linear, tanh and add; the norm reads the last block instead
    assert counts(found) == {"added": 5 * more, "rewired": 1}
    assert named(found, "rewired")[0].startswith("layer_norm")


@pytest.mark.parametrize(
    ("other", "status", "what"),
    [
        (Wider, "changed", "Linear: out_features=2 -> out_features=5"),
        (Smooth, "changed", "ReLU, inplace=True -> Tanh"),
        (Longer, "added", ""),
        (lambda: Net().double(), "changed", "float32"),
        (lambda: fx.symbolic_trace(Longer()), "added", ""),
    ],
    ids=["shapes", "options", "graph", "types", "traced"],
)
def test_a_training_model_and_another_network(other: Callable[[], nn.Module], status: Status, what: str) -> None:
    found = compared(simple("body"), other())
    rows = [row for row in found.rows if row.status == status]
    assert any(what in row.what for row in rows), rows


def test_unrelated_graphs_are_not_drawn() -> None:
    a, b = (fx.symbolic_trace(net) for net in (conv_net(), nn.Sequential(nn.Softmax(1), nn.Flatten())))
    with pytest.raises(DiffError, match="hardly a node in common") as refused:
        fxcollab.diff(a, b)
    assert refused.value.hint and "Sequential: graph, 6 nodes" in str(refused.value)


def test_every_node_of_both_stands_in_one_row() -> None:
    a, b = simple("body"), fxcollab.transform(Net(), "ladder", ["stem", "body"], seed=0)
    rows: tuple[Row, ...] = compared(a, b).rows
    assert sorted(row.a.name for row in rows if row.a) == sorted(node.name for node in a.graph.nodes)
    assert [row.b.name for row in rows if row.b] == [node.name for node in b.graph.nodes]


def test_the_text_numbers_places_and_folds_what_is_the_same() -> None:
    text = str(compared(simple("body"), simple("stem")))
    assert text.splitlines()[:2] == [
        "A  Net: training graph, 2 heads, simple at body, 9 nodes",
        "B  Net: training graph, 2 heads, simple at stem, 10 nodes",
    ]
    assert "1 of 2" in text and "+ body_b1  Sequential" in text and "> tail  reads rescale -> body" in text
    assert "= stem" not in text
    assert "- 1 removed  + 2 added  ~ 0 changed  > 3 rewired  = 5 same" in text


def test_json_holds_all_rows_and_is_the_same_twice() -> None:
    found = compared(simple("body"), simple("stem"))
    data = json.loads(found.to_json())
    assert found.to_json() == compared(simple("body"), simple("stem")).to_json()
    assert data["counts"]["added"] == 2 and len(data["rows"]) == 11
    assert {"a", "b", "status", "what"} == data["rows"][0].keys()


# Counted by hand for networks of torchvision.


def resnet18() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.resnet18()


@pytest.mark.parametrize("ending", [pytest.param(e, marks=[needs_a_font] * (e == ".png")) for e in VIEWS])
def test_every_view_draws_two_graphs_or_says_what_does(ending: str, tmp_path: Path) -> None:
    found, file = compared(Net(), Longer()), tmp_path / f"two{ending}"
    if ending == ".dot":
        with pytest.raises(DiffError, match=r"can't be drawn as \.dot") as raised:
            found.save(file)
        assert raised.value.hint == "write one of .html, .svg, .png, .json" and not file.exists()
    else:
        found.save(file)
        assert is_generated(file)


@pytest.mark.slow
def test_two_plans_of_a_resnet() -> None:
    a = fxcollab.transform(resnet18(), "simple", ["layer2"], seed=0)
    b = fxcollab.transform(resnet18(), "hierarchical", ["layer2", "layer3"], seed=0)
    # added: layer4, avgpool, flatten and fc for two more heads, a rescale of layer3 in each branch
    # rewired: the two layer4 that now read a rescale; changed: the output, a tuple of four
    found = compared(a, b)
    assert counts(found) == {"added": 2 * 4 + 2, "rewired": 2, "changed": 1} and found.count("same") == 16
    assert [len(hunk) for hunk in found.hunks] == [2, 4, 2, 5]


@pytest.mark.slow
def test_a_resnet_before_and_after_fusing() -> None:
    model = torchvision.models.resnet18().eval()
    found = compared(fx.symbolic_trace(model), fuse(model))
    # 20 normalisations go into 20 convolutions; the stem's ReLU, 8 inner ones and 8 additions read these instead
    assert counts(found) == {"removed": 20, "changed": 20, "rewired": 1 + 8 + 8} and found.count("same") == 71 - 57


@pytest.mark.slow
def test_an_exported_vit_of_another_depth() -> None:
    def exported(depth: int) -> nn.Module:
        vit = torchvision.models.VisionTransformer(32, 8, depth, 2, 16, 32).eval()
        return torch.export.export(vit, (torch.zeros(1, 3, 32, 32),)).module()

    one, two, four = map(exported, (1, 2, 4))
    block = len(two.graph.nodes) - len(one.graph.nodes)  # type: ignore[arg-type, union-attr]
    assert counts(compared(two, four)) == {"added": 2 * block, "rewired": 1}, "the last normalisation"
