"""What belongs to a parameter beside its values: its class, attributes, hooks, and the memory that it shares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab
from fxcollab import CollabGraphModule, StateError
from tests.rewriting.hazard_helpers import Stem, X, proven


def trained(model: nn.Module, splits: tuple[str, ...] = ("stem",), steps: int = 3) -> CollabGraphModule:
    """Proved, trained, and each head's weights loaded into the model's copy compute what the head does."""
    fresh = copy.deepcopy(model)
    train_model = proven(model, splits)
    optimizer = torch.optim.SGD(train_model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(output.square().mean() for output in train_model.train()(X)).backward()
        optimizer.step()
    heads = fxcollab.all_heads(train_model.eval())(X)
    for head, expected in enumerate(heads):
        fresh.load_state_dict(fxcollab.prune_state_dict(train_model.state_dict(), head))
        assert torch.equal(fresh.eval()(X), expected)
        assert torch.equal(fxcollab.prune(train_model, head).eval()(X), expected)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    return train_model


class Averaged(nn.Linear):
    """Keeps an average of its weight on the weight itself."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight.average = self.weight.detach().clone()  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        average = self.weight.average  # type: ignore[attr-defined]
        if self.training:
            average.lerp_(self.weight.detach(), 0.1)
        return F.linear(x, self.weight + average, self.bias)


def test_tensors_on_parameters_are_each_heads_own() -> None:
    model = Stem(Averaged())
    train_model = proven(model, ["stem"])
    mine, theirs = (part.behind.weight.average for part in (train_model, train_model.peers.b1))
    before = mine.clone()
    theirs.zero_()
    assert mine is not theirs and torch.equal(mine, before)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()  # also where heads' have come to differ


class Scaled(nn.Parameter):
    """A parameter that its layer treats in a way of its own."""


class ScaledLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Scaled(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * 2 if isinstance(self.weight, Scaled) else self.weight)


class ByCount(nn.Parameter):
    """A parameter that can't be made from a tensor alone."""

    def __new__(cls, rows: int, columns: int) -> Any:
        return super().__new__(cls, torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))


class CountedLayer(ScaledLayer):
    def __init__(self) -> None:
        super().__init__()
        self.weight = ByCount(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * 2 if type(self.weight) is ByCount else self.weight)


@pytest.mark.parametrize("layer", [ScaledLayer, CountedLayer])
def test_parameters_keep_their_class_in_every_head(layer: type[ScaledLayer]) -> None:
    train_model = proven(Stem(layer()), ["stem"])
    assert type(train_model.peers.b1.behind.weight) is type(train_model.behind.weight) is not nn.Parameter


@pytest.mark.parametrize("accumulated", [False, True])
def test_hooks_on_parameters_are_in_every_head(accumulated: bool) -> None:
    model, mask = Stem(nn.Linear(4, 4)), torch.tensor([[1.0], [0], [0], [0]])
    weight: Any = model.behind.weight

    def masked(parameter: Any) -> None:
        parameter.grad.mul_(mask)

    if accumulated:
        weight.register_post_accumulate_grad_hook(masked)
    else:
        weight.register_hook(lambda gradient: gradient * mask)
    train_model = proven(model, ["stem"])
    sum(output.square().mean() for output in train_model.train()(X)).backward()
    for part in (train_model, train_model.peers.b1):
        assert (part.behind.weight.grad != 0).any(1).tolist() == [True, False, False, False]


def test_a_hook_reads_the_tensors_of_its_own_head() -> None:
    model = Stem(nn.Linear(4, 4))
    weight, bias = model.behind.weight, model.behind.bias
    weight.register_hook(lambda gradient: gradient * 0 + bias.detach())
    train_model = proven(model, ["stem"])
    sum(output.sum() for output in train_model.train()(X)).backward()
    for part in (train_model, train_model.peers.b1):
        assert torch.equal(part.behind.weight.grad, part.behind.bias.expand(4, 4))


class TiedByMemory(Stem):
    """Two parameters over one memory: all of it, or the first rows of it."""

    def __init__(self, rows: int = 4, by_data: bool = False) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, rows), nn.ReLU(), nn.Linear(rows, 4)))
        first, last = self.behind[0], self.behind[2]  # type: ignore[index]
        if by_data:
            first.weight.data = last.weight.data[:rows]
        else:
            first.weight = nn.Parameter(last.weight.flatten()[: 4 * rows].view(rows, 4))


@pytest.mark.parametrize(("rows", "by_data"), [(4, False), (4, True), (2, False)])
def test_parameters_that_share_memory_share_it_in_every_head(rows: int, by_data: bool) -> None:
    train_model = trained(TiedByMemory(rows, by_data))
    for part in (train_model, train_model.peers.b1):
        first, last = part.behind[0].weight, part.behind[2].weight
        assert first.data_ptr() == last.data_ptr()
    assert train_model.behind[0].weight.data_ptr() != train_model.peers.b1.behind[0].weight.data_ptr()


def test_a_buffer_that_is_a_view_of_a_weight_follows_it_in_every_head() -> None:
    model = Stem(nn.Linear(4, 4))
    model.behind.register_buffer("row", model.behind.weight.detach()[1])
    train_model = trained(model)
    for part in (train_model, train_model.peers.b1):
        assert torch.equal(part.behind.row, part.behind.weight[1])


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_share_memory_over_a_split_are_refused_unless_they_are_frozen(frozen: bool) -> None:
    model = Stem(nn.Linear(4, 4))
    model.behind.weight = nn.Parameter(model.stem.weight.detach())
    for parameter in (model.behind.weight, model.stem.weight):
        parameter.requires_grad_(not frozen)
    if frozen:
        assert proven(model, ["stem"], init="finetune").peers.b1.behind.weight is not None
        return
    with pytest.raises(StateError, match=r"'stem.weight' and 'behind.weight' are two tensors in the same memory"):
        fxcollab.transform(model, splits=["stem"])
    model.behind.weight = model.stem.weight  # the hint
    proven(model, ["stem"])


def test_weights_that_lie_beside_one_another_in_one_memory_are_no_tie() -> None:
    """As those of recurrent layers on GPUs."""
    model, memory = Stem(nn.Linear(4, 4)), torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.stem.weight, model.behind.weight = (nn.Parameter(part.view(4, 4)) for part in memory.chunk(2))
    trained(model)


class Scripted(nn.Module):
    """A part of it is scripted, which has a part itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.behind = nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.behind(self.stem(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parameters_of_scripted_modules_are_leaves_in_every_head() -> None:
    model = Scripted()
    dict(model.behind.named_parameters())["0.bias"].requires_grad_(False)
    train_model = proven(model, ["stem"])
    mine, theirs = (dict(part.behind.named_parameters()) for part in (train_model, train_model.peers.b1))
    assert theirs["0.weight"].is_leaf and theirs["0.weight"].requires_grad and not theirs["0.bias"].requires_grad
    train_model.train()(X)[1].sum().backward()
    assert mine["0.weight"].grad is None and theirs["0.weight"].grad.any()
