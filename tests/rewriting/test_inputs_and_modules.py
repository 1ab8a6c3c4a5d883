"""Inputs, state at the root, random operations, and kinds of modules behind and before a split."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxcollab
from tests.rewriting.hazard_helpers import IMAGE, SEQUENCE, Stem, X, proven
from tests.speeds import slow_but

# --------------------------------------------------------------------------------------- random operations


class Random(Stem):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + torch.rand(4) + torch.rand_like(x)
        x = F.dropout(x, 0.5, self.training)
        x = self.behind(x)
        return self.head(x * torch.bernoulli(torch.full_like(x, 0.5)))


@pytest.mark.parametrize("splits", slow_but([["behind"]], [["stem"], ["behind"], []]))
def test_random_operations_draw_per_branch(splits: list[str]) -> None:
    pattern = "hierarchical" if splits else "multi-instance"
    train_model = proven(Random(nn.Dropout(0.3)), splits, pattern=pattern, init="copy")
    outputs = train_model.train()(X)
    assert not torch.equal(outputs[0], outputs[1])


def test_dropout_alone_makes_copies_differ() -> None:
    train_model = proven(Stem(nn.Dropout(0.5)), ["stem"], init="copy")
    outputs = train_model.train()(X)
    assert not torch.equal(outputs[0], outputs[1])
    outputs = fxcollab.all_heads(train_model.eval())(X)
    assert torch.equal(outputs[0], outputs[1])


# ------------------------------------------------------------------------------------------ inputs and state


class ManyInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.a(x)
        h = h if mask is None else h * mask
        return self.c((h + self.b(y)).relu())[index]


INDEX = torch.tensor([2, 0])


@pytest.mark.parametrize("splits", slow_but([["a+b"]], [["a"], ["b"], ["a+b"], []]))
@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param((X, X.flip(0), INDEX), id="three", marks=pytest.mark.slow),
        pytest.param((X, X.flip(0), INDEX, X > 0), id="four"),
        pytest.param({"y": X, "x": X.sin(), "index": INDEX, "mask": X}, id="keywords"),
    ],
)
def test_multiple_inputs(inputs: Any, splits: list[str]) -> None:
    proven(ManyInputs(), splits, inputs, pattern="hierarchical" if splits else "multi-instance")


class Bare(nn.Module):
    """Parameters, buffers and plain tensors at the root, used behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale, self.both = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("hidden", torch.randn(4), persistent=False)
        self.list = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.plain = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.both + self.plain
        weight = (self.scale - self.scale.mean()) / self.scale.std()
        x = x * weight + self.mean + self.hidden * self.both + self.list[0] * self.list[1]
        return self.head(x * self.plain)


@pytest.mark.parametrize("splits", slow_but([["stem"]], [["stem"], ["add_1"], []]))
def test_bare_parameters_and_buffers_at_the_root(splits: list[str]) -> None:
    train_model = proven(Bare(), splits, pattern="hierarchical" if splits else "multi-instance")
    assert train_model.peers.b1.scale is not train_model.scale
    assert "peers.b1.hidden" not in train_model.state_dict()
    assert "peers.b1.mean" in train_model.state_dict()


class StandardConv(nn.Conv2d):
    """Weight standardisation: the weight is computed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ConvNet(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv, nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


@pytest.mark.parametrize("granularity", slow_but(["auto"], ["auto", "op"]))
def test_a_weight_computed_behind_the_split(granularity: str) -> None:
    model = ConvNet(StandardConv(4, 4, 3, padding=1))
    proven(model, ["conv1"], (IMAGE,), granularity=granularity)


@pytest.mark.parametrize(
    "splits",
    slow_but(
        [["bn1", "conv2"]],
        [["conv1"], ["bn1"], ["relu"], ["conv2"], ["relu@2"], ["bn1", "conv2"]],
    ),
)
def test_batch_norm_in_trunk_and_head(splits: list[str]) -> None:
    model = ConvNet(conv())
    train_model = proven(model, splits, (IMAGE,))
    before = {name: b.clone() for name, b in train_model.named_buffers()}
    train_model.train()(IMAGE)
    after = dict(train_model.named_buffers())
    for name in before:
        assert name.endswith("num_batches_tracked") or not torch.equal(before[name], after[name])
        assert not name.endswith("num_batches_tracked") or after[name] == before[name] + 1


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm of old": torch.nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm of old": torch.nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("splits", slow_but([["conv1"]], [["conv1"], ["conv2"]]), ids=["in the head", "in the trunk"])
@pytest.mark.parametrize("norm", slow_but([NORMS["weight_norm"]], NORMS.values()), ids=NORMS.keys())
def test_parametrized_weights(norm: Callable[[nn.Module], nn.Module], splits: list[str]) -> None:
    model = ConvNet(norm(conv()))
    train_model = proven(model, splits, (IMAGE,), init="copy-anyway" if norm is NORMS["orthogonal"] else "fresh")
    sum(head.sum() for head in train_model.train()(IMAGE)).backward()
    missing = [name for name, p in train_model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(self.stem(x))
        x, _ = self.attention(x, x, x)
        return self.head(self.layer(x))


@pytest.mark.parametrize(
    "splits", slow_but([["layer"]], [["stem"], ["lstm"], ["attention"], ["layer"], ["lstm", "attention"]])
)
def test_recurrent_and_attention_modules(splits: list[str]) -> None:
    proven(Sequences(), splits, (SEQUENCE,))


def test_hooks_of_kept_modules_run_in_every_head() -> None:
    model, seen = Stem(nn.Linear(4, 4)), []
    model.behind.register_forward_hook(lambda module, inputs, output: output * 2)
    model.behind.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    train_model = proven(model, ["stem"])
    seen.clear()
    train_model(X)
    assert seen == [model.behind, train_model.peers.b1.behind]


def test_counters_are_private_to_a_branch() -> None:
    class Counts(Stem):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("in_trunk", torch.zeros(()))
            self.register_buffer("in_head", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.in_trunk += 1
            x = self.stem(x)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.in_head.add_(x.shape[0])
            return self.head(x - self.mean) * self.in_trunk

    model = Counts()
    train_model = proven(model, ["stem"])
    reference = copy.deepcopy(model)
    for _ in range(3):
        train_model(X)
        reference(X)
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert train_model.peers.b1.in_head == 9
    assert not train_model.mean.requires_grad
