"""What belongs to a parameter beside its values: its class, attributes, hooks, and the memory that it lies in."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab
from fxcollab import CollabGraphModule, StateError
from tests.rewriting.hazard_helpers import Stem, X, proven


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


def test_tensors_with_a_history_on_parameters_are_each_heads_own_too() -> None:
    model = Stem(nn.Linear(4, 4))
    model.behind.weight.scaled = [model.behind.weight * 2]
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    (mine,), (theirs,) = (part.behind.weight.scaled for part in (train_model, train_model.peers.b1))
    assert theirs is not mine and torch.equal(theirs, mine)


def test_what_on_a_parameter_cannot_be_copied_is_shared_unless_it_has_tensors() -> None:
    model, lock = Stem(nn.Linear(4, 4)), threading.Lock()
    model.behind.weight.lock = lock
    assert fxcollab.transform(model, splits=["stem"], seed=0).peers.b1.behind.weight.lock is lock
    model.behind.weight.lock = [lock, torch.ones(2)]
    with pytest.raises((fxcollab.FxCollabError, TypeError), match="lock"):
        fxcollab.transform(model, splits=["stem"], seed=0)


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
def test_hooks_on_parameters_are_said_to_be_head_0s(accumulated: bool) -> None:
    model = Stem(nn.Linear(4, 4))
    for parameter in (model.stem.weight, model.behind.weight):
        register = parameter.register_post_accumulate_grad_hook if accumulated else parameter.register_hook
        register(lambda value: None)
    with pytest.warns(UserWarning, match="hooks on behind.weight are those of head 0's parameters"):
        train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    found = [n for n, _ in train_model.named_parameters() if fxcollab.original_name(n) == "behind.weight"]
    assert found == ["behind.weight", "peers.b1.behind.weight"]  # as the sentence says
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def over_one_memory(first: Tensor, second: Tensor, split: str = "stem") -> CollabGraphModule:
    """Parameters of two layers behind the split, or one of them at it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[1].weight, model[3].weight = nn.Parameter(first), nn.Parameter(second)
    return proven(model, [split])


MEMORY = torch.randn(40, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("split", ["0", "1"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(MEMORY[:16].view(4, 4), MEMORY[:16].view(4, 4), id="the same"),
        pytest.param(MEMORY[:16].view(4, 4), MEMORY[15:31].view(4, 4), id="one element"),
        pytest.param(WIDE[:, :4], WIDE[:, 3:7], id="a column"),
        pytest.param(MEMORY[:16].view(4, 4), MEMORY[:16].view(4, 4).t(), id="turned"),
    ],
)
def test_parameters_that_share_memory_are_refused(first: Tensor, second: Tensor, split: str) -> None:
    with pytest.raises(
        StateError, match=r"'[13].weight' and '[13].weight' are two tensors in the same memory"
    ) as caught:
        over_one_memory(first, second, split)
    assert "module.weight = other.weight" in str(caught.value.hint)


@pytest.mark.parametrize("split", ["0", "1"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(MEMORY[:16].view(4, 4), MEMORY[16:32].view(4, 4), id="beside one another"),
        pytest.param(WIDE[:, :4], WIDE[:, 4:], id="other columns"),
        pytest.param(MEMORY[::2][:16].view(4, 4), MEMORY[1::2][:16].view(4, 4), id="interlaced"),
    ],
)
def test_parameters_beside_one_another_in_one_memory_are_not(first: Tensor, second: Tensor, split: str) -> None:
    train_model = over_one_memory(first, second, split)
    optimizer = torch.optim.SGD(train_model.parameters(), 0.1)
    sum(output.square().mean() for output in train_model.train()(X)).backward()
    optimizer.step()
    fxcollab.verify(fxcollab.original(train_model), train_model, (X,)).raise_if_failed()


def test_other_types_are_compared_by_their_bytes() -> None:
    model, memory = Stem(nn.Linear(4, 4)), torch.randn(64, generator=torch.Generator().manual_seed(0))
    model.stem.weight = nn.Parameter(memory[16:32].view(4, 4))
    model.behind.register_parameter("other", nn.Parameter(torch.view_as_complex(memory[32:].view(16, 2))))
    assert fxcollab.transform(model, splits=["stem"]).peers.b1.behind.other.is_complex()
    model.stem.weight = nn.Parameter(memory[48:].view(4, 4))
    with pytest.raises(StateError, match="same memory"):
        fxcollab.transform(model, splits=["stem"])


def test_a_view_of_a_weight_as_a_buffer_is_refused_and_both_hints_work() -> None:
    model = Stem(nn.Linear(4, 4))
    model.behind.register_buffer("row", model.behind.weight.detach()[1])
    with pytest.raises(StateError, match="same memory") as caught:
        fxcollab.transform(model, splits=["stem"])
    assert "weight = model.get_parameter('behind.row'); weight.data = weight.data.clone()" in str(caught.value.hint)
    model.behind.row.data = model.behind.row.data.clone()
    proven(model, ["stem"])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[1].weight
    proven(tied, ["0"])


def test_memory_shared_before_all_splits_or_by_what_is_frozen_is_no_matter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(model[1].weight.detach())
    model[2].weight, model[2].frozen = nn.Parameter(MEMORY[:16].view(4, 4), False), nn.Parameter(MEMORY[:16], False)
    proven(model, ["1"])


def test_conjugated_views_and_other_classes_keep_what_they_are_in_every_head() -> None:
    class Marked(Tensor):
        pass

    layer, values = nn.Linear(4, 4), torch.randn(4, dtype=torch.complex64)
    layer.register_buffer("values", values)
    layer.register_buffer("conjugated", values.conj())
    layer.register_buffer("negated", values.conj().imag)
    layer.register_buffer("marked", torch.ones(2).as_subclass(Marked))
    train_model = fxcollab.transform(Stem(layer), splits=["stem"], seed=0)
    for name, buffer in train_model.behind.named_buffers():
        copy_of = train_model.peers.b1.behind.get_buffer(name)
        assert torch.equal(copy_of, buffer) and type(copy_of) is type(buffer) and copy_of is not buffer


def test_modules_on_parameters_are_shared_unless_every_head_has_its_own() -> None:
    model, teacher = Stem(nn.Linear(4, 4)), nn.Linear(4, 4)
    model.behind.weight.held = [teacher, model.stem, model.behind]
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    shared, stem, own = train_model.peers.b1.behind.weight.held
    assert shared is teacher and stem is model.stem and own is train_model.peers.b1.behind is not model.behind


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
