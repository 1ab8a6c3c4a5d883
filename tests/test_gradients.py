"""Outputs and gradients against the hand-wired networks of figures 1 and 2, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fxcollab
from tests.references import (
    HandHierarchical,
    HandInstances,
    HandNetwork,
    HandSimple,
    HandSkipTree,
    HandTree,
    SkipNet,
    SmallConvNet,
)
from tests.speeds import slow_but

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A wiring: by hand, and as fxcollab is told to make it."""

    hand: Callable[[bool], HandNetwork]
    net: Callable[[], nn.Module]
    options: dict[str, Any]


def _simple(heads: int) -> Case:
    return Case(
        lambda rescale: HandSimple(SmallConvNet, heads, rescale=rescale),
        SmallConvNet,
        {"pattern": "simple", "splits": HandSimple.splits, "heads": heads},
    )


def _tree(*fanouts: int) -> Case:
    return Case(
        lambda rescale: HandTree(SmallConvNet, fanouts, rescale=rescale),
        SmallConvNet,
        {"pattern": "hierarchical", "splits": HandTree.splits, "fanouts": fanouts},
    )


def _skip_tree(*fanouts: int) -> Case:
    return Case(
        lambda rescale: HandSkipTree(SkipNet, fanouts, rescale=rescale),
        SkipNet,
        {"pattern": "hierarchical", "splits": HandSkipTree.splits, "fanouts": fanouts},
    )


def _instances(net: Callable[[], nn.Module], heads: int) -> Case:
    return Case(
        lambda rescale: HandInstances(net, heads, rescale=rescale),
        net,
        {"pattern": "multi-instance", "heads": heads},
    )


CASES = {
    "simple, 2 heads": _simple(2),
    "simple, 3 heads": _simple(3),
    "simple, 5 heads": _simple(5),
    "hierarchical": Case(
        lambda rescale: HandHierarchical(SmallConvNet, rescale=rescale),
        SmallConvNet,
        {"pattern": "hierarchical", "splits": HandHierarchical.splits},
    ),
    "tree (2, 3)": _tree(2, 3),
    "tree (4, 2)": _tree(4, 2),
    "skips (2, 2)": _skip_tree(2, 2),
    "skips (3, 2)": _skip_tree(3, 2),
    "2 instances": _instances(SmallConvNet, 2),
    "3 instances with skips": _instances(SkipNet, 3),
}

Loss = Callable[[Any, Tensor], Tensor]


def sum_over_heads(outputs: Any, target: Tensor) -> Tensor:
    return sum(F.cross_entropy(output, target) for output in outputs)


LOSSES: dict[str, Loss] = {
    "cross entropy": sum_over_heads,
    "collaborative": fxcollab.CollaborativeLoss(beta=0.3, temperature=1.7, detach=False),
    "detached": fxcollab.CollaborativeLoss(),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (4,), generator=generator)


def both(case: Case, rescale: bool, granularity: str = "auto") -> tuple[fxcollab.CollabGraphModule, HandNetwork]:
    """The training model and the hand network that holds the same state."""
    torch.manual_seed(0)
    net = case.net().double()
    _make_buffers_differ(net)
    train_model = fxcollab.transform(net, **case.options, seed=5, rescale=rescale, granularity=granularity)
    hand = case.hand(rescale).double()
    hand.load_from(train_model.state_dict())
    return train_model, hand


def _make_buffers_differ(net: nn.Module) -> None:
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))


def run(module: nn.Module, batch: tuple[Tensor, Tensor], loss: Loss) -> tuple[tuple[Tensor, ...], Tensor]:
    """Outputs and the input's gradient; the parameters' are left in place."""
    x = batch[0].clone().requires_grad_()
    outputs = module(x)
    loss(outputs, batch[1]).backward()
    assert x.grad is not None
    return outputs, x.grad


def named_gradients(train_model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in train_model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        rounding = 1e-13 * float(gradient.abs().max())
        assert_close(found[name], gradient, rtol=1e-12, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "case",
    slow_but(
        ["simple, 3 heads", "hierarchical", "tree (2, 3)", "skips (2, 2)", "2 instances", "3 instances with skips"],
        CASES,
    ),
    indirect=True,
)
@pytest.mark.parametrize("loss", slow_but(["collaborative"], LOSSES))
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain sum"])
def test_gradients_equal_those_of_the_network_wired_by_hand(
    case: Case, rescale: bool, loss: str, batch: tuple[Tensor, Tensor]
) -> None:
    train_model, hand = both(case, rescale)
    outputs, input_gradient = run(train_model, batch, LOSSES[loss])
    expected, expected_gradient = run(hand, batch, LOSSES[loss])
    assert len(outputs) == len(expected)
    for output, other in zip(outputs, expected, strict=True):
        assert torch.equal(output, other)
    assert_equal_gradients(named_gradients(train_model), hand.named_gradients())
    assert len(hand.named_gradients()) == len(list(train_model.parameters()))
    assert_equal_gradients({"input": input_gradient}, {"input": expected_gradient})


@pytest.mark.parametrize("case", slow_but(["simple, 2 heads", "skips (2, 2)", "2 instances"], CASES), indirect=True)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_and_statistics_equal_the_hand_networks(case: Case, mode: str, batch: tuple[Tensor, Tensor]) -> None:
    train_model, hand = both(case, rescale=True)
    train_model.train(mode == "train"), hand.train(mode == "train")
    for _ in range(2):
        for output, expected in zip(fxcollab.all_heads(train_model)(batch[0]), hand(batch[0]), strict=True):
            assert torch.equal(output, expected)
    state, expected_state = train_model.state_dict(), hand.fxcollab_state_dict()
    assert state.keys() == expected_state.keys()
    for name in state:
        assert torch.equal(state[name], expected_state[name]), name


@pytest.mark.parametrize("case", slow_but(["skips (2, 2)"], CASES), indirect=True)
def test_the_op_level_graph_has_the_same_gradients(case: Case, batch: tuple[Tensor, Tensor]) -> None:
    train_model, hand = both(case, rescale=True, granularity="op")
    outputs, input_gradient = run(train_model, batch, sum_over_heads)
    expected, expected_gradient = run(hand, batch, sum_over_heads)
    for output, other in zip(outputs, expected, strict=True):
        assert torch.equal(output, other)
    assert_equal_gradients(named_gradients(train_model), hand.named_gradients())
    assert_equal_gradients({"input": input_gradient}, {"input": expected_gradient})


@pytest.mark.parametrize("case", slow_but(["skips (2, 2)"], CASES), indirect=True)
def test_rescaling_is_what_makes_the_difference(case: Case, batch: tuple[Tensor, Tensor]) -> None:
    """Of the plain sum, a parameter of n heads gets n times the mean; hand and fxcollab can't both be wrong."""
    scaled, hand = both(case, rescale=True)
    plain, _ = both(case, rescale=False)
    run(scaled, batch, sum_over_heads), run(plain, batch, sum_over_heads)
    found, sums = named_gradients(scaled), named_gradients(plain)
    behind = hand.heads_behind()
    assert found.keys() == behind.keys()
    for name, heads in behind.items():
        scale = float(sums[name].abs().max())
        assert_close(found[name] * len(heads), sums[name], rtol=1e-9, atol=1e-11 * scale, msg=name)


def test_gradients_are_the_mean_over_separate_originals(case: Case, batch: tuple[Tensor, Tensor]) -> None:
    """The mean over the heads behind, with every head an original of its own."""
    train_model, hand = both(case, rescale=True)
    originals = []
    for head in range(len(hand.paths)):
        original = case.net().double()
        original.load_state_dict(hand.head_state_dict(head))
        originals.append(original)
    _, input_gradient = run(train_model, batch, sum_over_heads)
    per_head = [run(original, batch, lambda z, y: F.cross_entropy(z, y))[1] for original in originals]
    assert_equal_gradients({"input": input_gradient}, {"input": sum(per_head) / len(per_head)})
    for name, heads in hand.heads_behind().items():
        own = name.split(".", 2)[2] if name.startswith("peers.") else name
        mean = sum(originals[head].get_parameter(own).grad for head in heads) / len(heads)
        scale = float(mean.abs().max())
        assert_close(train_model.get_parameter(name).grad, mean, rtol=1e-10, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("case", slow_but(["tree (2, 3)", "2 instances"], CASES), indirect=True)
def test_several_steps_of_training_stay_together(case: Case, batch: tuple[Tensor, Tensor]) -> None:
    train_model, hand = both(case, rescale=True)
    loss = fxcollab.CollaborativeLoss(detach=False)
    for module in (train_model, hand):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            run(module, batch, loss)
            optimizer.step()
    expected = hand.fxcollab_state_dict()
    for name, value in train_model.state_dict().items():
        assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)
