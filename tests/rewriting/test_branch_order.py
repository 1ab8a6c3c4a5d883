"""The code runs branch by branch; what writes a value or state and what reads it keep the captured order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CollabGraphModule
from fxcollab.errors import PatternError
from tests.rewriting.hazard_helpers import X, proven


class Layers(nn.Module):
    """Linear layers ``a`` to ``f``, two BatchNorms, also inside ``both``, a renormalised table, and a buffer."""

    steps: Tensor

    def __init__(self, function: Callable[[Layers, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(4, 4) for _ in range(6))
        self.n, self.m, self.table = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Embedding(4, 4, max_norm=0.5)
        self.both, self.function = Both(self.n, self.m), function
        self.register_buffer("steps", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Both(nn.Module):
    def __init__(self, n: nn.Module, m: nn.Module) -> None:
        super().__init__()
        self.n, self.m = n, m

    def forward(self, x: Tensor) -> Tensor:
        return self.n(x) + self.m(x)


def calls(train_model: CollabGraphModule) -> list[str]:
    return [node.name for node in train_model.graph.nodes if node.op == "call_module"]


# ------------------------------------------------------------- inside a branch: a node that waits holds up the rest


def a_module_after_one_that_waits(net: Layers, x: Tensor) -> Tensor:
    deep = net.n(net.c(net.a(x)))
    trunk = net.both(net.b(x))  # waits for ``n``
    return net.e(deep) + trunk + net.m(net.d(x))  # ``m`` waits for nothing, and is called in ``both``


def a_read_after_a_write_that_waits(net: Layers, x: Tensor) -> Tensor:
    deep = net.c(net.a(x)).detach() * net.steps
    net.steps.add_(1)  # waits for the read above
    return net.d(deep) + net.b(x) * net.steps.clone()


def a_branch_that_waits_for_the_trunk(net: Layers, x: Tensor) -> Tensor:
    split = net.a(x)
    middle = net.c(split * 2)
    deep = net.n(net.d(middle))
    trunk = net.n(net.b(x))
    return deep + net.m(net.e(split) + trunk) + net.m(net.f(split))


# ------------------------------------------------------------------- state that one reads as a value, the other calls


def a_buffer_read_before_the_call_that_writes_it(net: Layers, x: Tensor) -> Tensor:
    deep = net.c(net.a(x)) + net.n.running_mean
    return net.d(deep) + net.n(net.b(x))


def a_buffer_read_after_the_call_that_writes_it(net: Layers, x: Tensor) -> Tensor:
    deep = net.c(net.a(x))
    trunk = net.n(net.b(x))
    return net.d(deep + net.n.running_mean) + trunk


ONE, TWO = {"splits": ["a"]}, {"splits": ["a", "c"]}


@pytest.mark.filterwarnings("ignore:limitation")
@pytest.mark.parametrize("granularity", ["auto", "op"])
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (a_module_after_one_that_waits, ONE),
        (a_read_after_a_write_that_waits, ONE),
        (a_branch_that_waits_for_the_trunk, TWO),
        (a_branch_that_waits_for_the_trunk, TWO | {"fanouts": (2, (2, 1))}),
        (a_buffer_read_before_the_call_that_writes_it, ONE),
        (a_buffer_read_after_the_call_that_writes_it, ONE),
    ],
)
def test_nodes_that_share_state_keep_their_order(
    function: Callable[[Layers, Tensor], Tensor], options: dict[str, Any], granularity: str
) -> None:
    proven(Layers(function), granularity=granularity, **options)


def a_weight_read_before_the_call_that_writes_it(net: Layers, x: Tensor) -> Tensor:
    deep = net.c(net.a(x)) + net.table.weight.sum(0)
    return net.d(deep) + net.table(x.argmax(1)) + net.b(x)


def test_a_weight_that_a_call_renormalises_is_read_before() -> None:
    model = Layers(a_weight_read_before_the_call_that_writes_it)
    original = copy.deepcopy(model)
    train_model = fxcollab.transform(model, splits=["a"], init="copy-anyway")
    expected = original(X)
    assert all(torch.equal(output, expected) for output in train_model(X))


# ------------------------------------------------------------------------------------- no more waiting than is needed


def a_write_between_two_levels(net: Layers, x: Tensor) -> Tensor:
    split = net.a(x)
    deep = net.d(net.c(split))
    beside = net.e(split) * 1
    beside.add_(1)
    return net.f(deep + beside)


def a_trunk_that_writes_behind_what_read_before(net: Layers, x: Tensor) -> Any:
    trunk = net.b(x).detach()
    deep = net.d(net.c(net.a(x)) + trunk)
    trunk.add_(1)
    return net.e(deep), trunk


def test_branches_wait_only_for_branches_that_lie_on_their_way() -> None:
    """Of two siblings neither sees what the other writes."""
    assert calls(proven(Layers(a_write_between_two_levels), ["a", "c"], fanouts=(2, (2, 1)))) == [
        "a", "c", "e", "d", "f", "d_b0_1", "f_b0_1", "c_b1", "e_b1", "d_b1_0", "f_b1_0"
    ]  # fmt: skip
    proven(Layers(a_write_between_two_levels), ["a", "c"], recompute="heads")


def test_a_trunk_that_had_to_wait_goes_on_behind_the_branch_and_not_inside_it() -> None:
    train_model = proven(Layers(a_trunk_that_writes_behind_what_read_before), ["a"])
    assert [node.name for node in train_model.graph.nodes][-7:] == [
        "c_b1", "add_b1", "d_b1", "e_b1", "add_", "rescale_2", "output"
    ]  # fmt: skip


# ----------------------------------------------------------- computed again, a branch would read what came afterwards


def test_a_later_write_into_what_a_branch_reads_is_refused_with_recompute() -> None:
    with pytest.raises(PatternError, match=r"(?s)written in place.*'add_'.*would read detach after the write"):
        fxcollab.transform(
            Layers(a_trunk_that_writes_behind_what_read_before), splits=["a"], granularity="op", recompute="heads"
        )


def adds_the_input(net: Layers, x: Tensor) -> Tensor:
    return net.d(net.c(net.a(x * 2)) + x)


def test_an_input_that_is_written_before_the_backward_is_noticed_with_recompute() -> None:
    train_model = fxcollab.transform(Layers(adds_the_input), splits=["a"], recompute="heads")
    x = X.clone()
    loss = torch.stack(train_model(x)).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
