"""Branches of a level as one: the plain numbers to rounding, and everything else as it was."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import fxcollab
from fxcollab.errors import PatternError, StateError
from fxcollab.held import Snapshot, holders_of
from samples.networks.resnet_cifar import resnet_cifar
from tests.networks import TrunkGoesOn
from tests.references import SkipNet, SmallConvNet

X = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 5
TREES: dict[str, dict[str, Any]] = {
    "hierarchical": {"splits": ["layer1", "layer2"]},
    "fan-outs": {"splits": ["layer1", "layer2"], "fanouts": (3, 2)},
    "simple": {"pattern": "simple", "splits": ["layer1"], "heads": 4},
    "instances": {"pattern": "multi-instance", "heads": 3},
}


def pair(factory: Callable[[], nn.Module], **options: Any) -> tuple[fxcollab.CollabGraphModule, ...]:
    """The same training model twice, its branches in turn and as one, over tensors of their own."""
    torch.manual_seed(0)
    plain, other = (fxcollab.transform(factory().double(), seed=1, **options) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    return plain, fxcollab.batch_branches(other)


def loss_of(outputs: Any) -> Tensor:
    return torch.stack([F.cross_entropy(output, LABELS) for output in outputs]).sum()


def step(model: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    """Outputs and gradients of a step, and the buffers after it."""
    torch.manual_seed(0)
    model.zero_grad()
    outputs = model(x)
    loss_of(outputs).backward()
    found = {f"output {head}": output for head, output in enumerate(outputs)}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(
            found[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def calls(model: fxcollab.CollabGraphModule) -> int:
    return model.code.count("fxcollab_batched(")


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("factory", [SmallConvNet, SkipNet])
def test_outputs_gradients_and_statistics_are_the_plain_ones_to_rounding(
    factory: Callable[[], nn.Module], tree: str
) -> None:
    plain, batched = pair(factory, **TREES[tree])
    for _ in range(2):
        assert_alike(step(batched), step(plain))
    assert_alike(step(batched.eval()), step(plain.eval()))


def test_branches_opened_down_to_operations() -> None:
    plain, batched = pair(lambda: resnet_cifar(8, 5), splits=["stage1", "stage2"], granularity="op")
    assert_alike(step(batched), step(plain))


def test_five_steps_of_an_optimizer_lead_to_the_same_weights() -> None:
    models = pair(SmallConvNet, **TREES["hierarchical"])
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for _ in range(5):
            step(model)
            optimizer.step()
    plain, batched = models
    assert_alike(batched.state_dict(), plain.state_dict())


def test_state_and_graph_are_those_of_the_given_model() -> None:
    plain, _ = pair(SkipNet, **TREES["hierarchical"])
    batched = fxcollab.batch_branches(plain)
    own = dict(plain.named_parameters())
    assert all(own[name] is parameter for name, parameter in batched.named_parameters())
    assert list(batched.state_dict()) == list(plain.state_dict())
    assert [node.format_node() for node in batched.graph.nodes] == [node.format_node() for node in plain.graph.nodes]
    assert calls(plain) == 0 and calls(batched) == 2
    assert fxcollab.prune(batched, 1).code == fxcollab.prune(plain, 1).code
    assert fxcollab.verify(plain.root, batched, (X,))


def test_the_code_is_a_function_a_level() -> None:
    _, batched = pair(SmallConvNet, **TREES["simple"])
    lines = [line.partition(";  ")[0].strip() for line in batched.code.splitlines()]
    start = lines.index("def branch_b0(self, rescale):")
    assert lines[start + 1 : start + 10] == [
        "layer2 = self.layer2(rescale)",
        "layer3 = self.layer3(layer2)",
        "pool = self.pool(layer3)",
        "flatten = torch.flatten(pool, 1)",
        "fc = self.fc(flatten)",
        "return (fc,)",
        "(fc,), (fc_b1,), (fc_b2,), (fc_b3,) = fxcollab_batched(branch_b0, (",
        "dict(layer2=self.layer2, layer3=self.layer3, pool=self.pool, fc=self.fc),",
        "dict(layer2=self.peers.b1.layer2, layer3=self.peers.b1.layer3, pool=self.peers.b1.pool, "
        "fc=self.peers.b1.fc),",
    ]


class Writing(nn.Module):
    """The first thing behind the split writes in place into what all branches read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(768, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x.flatten(1)), inplace=True))


class Remembering(nn.Module):
    """Reads a buffer that it then writes, and assigns another anew."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.fc(x)) * self.scale.clone()
        self.scale.mul_(0.5)
        self.calls = self.calls + 1
        return y * self.calls


class RememberingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.memory, self.last = nn.Linear(768, 8), Remembering(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(self.first(x.flatten(1))))


class Sized(nn.Module):
    """Sizes, a tuple and None go from level to level beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(768, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x.flatten(1))
        second = self.second(first)
        size = second.size(0)
        return self.last(torch.tanh(second).view(size, -1)) + first.mean() * size


class TiedOverTheSplit(nn.Module):
    """A weight of the trunk is used again behind the split, by a module and by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Linear(768, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.tanh(self.embed(x.flatten(1)))))
        return self.out(torch.tanh(self.last(x)) + F.linear(x, self.first.weight))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = (
            nn.Linear(768, 8),
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.cell(self.first(x.flatten(1)))
        return self.last(self.cell(torch.relu(x)))


class Counting(nn.Module):
    """A forward that sets attributes: a number, and a tensor that it reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls, self.seen = nn.Linear(8, 8), 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = torch.tanh(self.fc(x))
        if self.seen is not None:
            y = y + 0.1 * self.seen
        self.seen = y.detach()
        return y * self.calls


class CountingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.counting, self.last = nn.Linear(768, 8), Counting(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.counting(self.first(x.flatten(1))))


class Normed(nn.Module):
    """Weights that are made anew at every call, by a hook and by a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(768, 8)
        self.old, self.new = (
            nn.utils.weight_norm(nn.Linear(8, 8)),
            nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        )
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.new(torch.tanh(self.old(self.first(x.flatten(1)))))))


class Shaped(nn.Module):
    """A size, whole, goes from one level to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(768, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x.flatten(1))
        second = self.second(first)
        shape = first.shape
        return self.last(torch.tanh(second).reshape(shape) + second.mean())


@pytest.mark.parametrize(
    ("factory", "splits"),
    [
        (Writing, ["first"]),
        (CountingNet, ["first"]),
        (Normed, ["first"]),
        (Shaped, ["first", "second"]),
        (RememberingNet, ["first"]),
        (Sized, ["first", "second"]),
        (TiedOverTheSplit, ["first"]),
        (CalledTwice, ["first"]),
    ],
)
@pytest.mark.parametrize("granularity", ["auto", "op"])
@pytest.mark.filterwarnings("ignore:given up")
def test_hazards(factory: Callable[[], nn.Module], splits: list[str], granularity: str) -> None:
    plain, batched = pair(factory, splits=splits, granularity=granularity)
    for _ in range(3):
        assert_alike(step(batched), step(plain))
    held = pytree.tree_leaves([list(module.__dict__.values()) for module in batched.modules()])
    assert not any(torch._C._functorch.is_batchedtensor(leaf) for leaf in held if isinstance(leaf, Tensor))


def test_attributes_that_a_forward_sets_are_each_siblings_own() -> None:
    plain, batched = pair(CountingNet, splits=["first"])
    for model in (plain, batched):
        step(model)
        step(model)
    for name in ("counting", "peers.b1.counting"):
        here, there = batched.get_submodule(name), plain.get_submodule(name)
        assert here.calls == there.calls == 2
        assert_close(here.seen, there.seen)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("p", lambda: 0.25, r"drop\.p\n  why: it is 0.0 in one and 0.25 in another"),
        ("state", lambda: [torch.ones(8), 1], r"drop\.state\.0\n  why: tensors are held there, each sibling's own"),
        ("state", lambda: {"a": [1, [2, random.random()]]}, r"drop\.state\['a'\]\[1\]\.1\n  why: it is 0\."),
        ("state", lambda: SimpleNamespace(at=object()), r"drop\.state\.at\n  why: it is <object"),
        ("state", lambda: np.random.rand(3), r"drop\.state\n  why: it is array"),
        ("state", lambda: lambda x: x, r"drop\.state\n  why: it is <function"),
        ("state", lambda: {random.random(): 1}, r"why: it is 1 in one and None in another"),
    ],
)
def test_attributes_that_differ_and_tensors_inside_of_them_are_refused(
    name: str, value: Callable[[], Any], why: str
) -> None:
    class Regular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc, self.drop = nn.Linear(768, 8), nn.Linear(8, 5), nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.drop(self.first(x.flatten(1))))

    _, batched = pair(Regular, splits=["first"])
    batched(X)
    setattr(batched.get_submodule("peers.b1.drop"), name, value())
    if name == "state":
        batched.get_submodule("drop").state = value()
    with pytest.raises(StateError, match=why):
        batched(X)


class Spectral(nn.Module):
    """Power iteration writes by ``out=``, which vmap doesn't know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(768, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)))


class Asking(nn.Module):
    """What is computed depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.asks = nn.Linear(768, 8), Asks()

    def forward(self, x: Tensor) -> Tensor:
        return self.asks(self.first(x.flatten(1)))


class Asks(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize("factory", [Spectral, Asking])
@pytest.mark.filterwarnings("ignore:no module initialises")
def test_what_vmap_cannot_run_is_refused(factory: Callable[[], nn.Module]) -> None:
    _, batched = pair(factory, splits=["first"])
    tensors = dict(batched.named_parameters())
    with pytest.raises(StateError, match="can't be run as one"):
        batched(X)
    assert all(parameter is tensors[name] for name, parameter in batched.named_parameters())


class Body(nn.Module):
    """Something behind the split, with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)


class Around(nn.Module):
    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(768, 8), body()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x.flatten(1)))


class LooksUp(Body):
    """Which row of a table is read depends on the branch; one row has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(3, 8, padding_idx=-2), nn.Linear(8, 5)
        self.out.weight.data.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.fc(x).argmax(1) % 3
        return self.out(self.table(rows) + x)


class HasPlainTensor(Body):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.linspace(1, 2, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class WritesItsWeight(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.mul_(0.9)
        return self.fc(x)


class ReplacesABuffer(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0).detach()
        return y - self.mean


class HasAnExpandedBuffer(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale

    def double(self) -> HasAnExpandedBuffer:
        return self


class Attends(Body):
    """What torch has a fast path for in eval mode, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x.unsqueeze(1))[:, 0])


RIGHT = [LooksUp, HasPlainTensor, WritesItsWeight, ReplacesABuffer, HasAnExpandedBuffer, Attends]


@pytest.mark.parametrize("body", RIGHT)
@pytest.mark.parametrize("training", [True, False])
def test_more_hazards(body: type[Body], training: bool) -> None:
    plain, batched = pair(lambda: Around(body), splits=["first"], init="copy-anyway")
    for model in (plain, batched):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        for i, module in enumerate(m for m in model.modules() if isinstance(m, HasPlainTensor)):
            module.scale = module.scale * i
        model.train(training)
    for _ in range(3):
        assert_alike(step(batched), step(plain))


class FillsAList(Body):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.fc(x).detach())
        return self.fc(x)


class FillsACache(Body):
    def __init__(self) -> None:
        super().__init__()
        self.cache = SimpleNamespace(found={})

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache.found:
            self.cache.found["bias"] = self.fc.weight.sum(1).detach()
        return self.fc(x) + self.cache.found["bias"]


class DrawsFromPython(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random()


class DrawsFromItsOwn(Body):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.generator.random()


class Checkpoints(Body):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)
        return found


class ReadsNumbers(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * float(y.detach().numpy().sum())


class WritesUnderAView(Body):
    """Two buffers over one storage."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.ones(2, 5, dtype=torch.float64)
        self.register_buffer("table", table)
        self.register_buffer("row", table[0])

    def double(self) -> WritesUnderAView:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.table.mul_(0.5)
        return self.fc(x) * self.row.clone()


def test_an_interrupt_leaves_containers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    _, batched = pair(lambda: Around(FillsAList), splits=["first"])
    calls = []

    def interrupted(layer: nn.Linear, x: Tensor) -> Tensor:
        calls.append(layer)
        if len(calls) == 3:  # of the trunk, of the branch, and once more behind the list
            raise KeyboardInterrupt
        return F.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(nn.Linear, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batched(X)
    body = batched.get_submodule("body")
    assert isinstance(body, FillsAList) and body.seen == []


class SetsAList(Body):
    """At the first call already, although nothing differs yet."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.found = [y.detach()]
        return y


class DeletesAnAttribute(Body):
    def __init__(self) -> None:
        super().__init__()
        self.pending = 1

    def forward(self, x: Tensor) -> Tensor:
        del self.pending
        return self.fc(x)


class HasANumberOfAnotherType(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("floor", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(self.fc(x), min=self.floor)


class Tallies(nn.Module):
    """In the trunk and behind the split: a module that counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls.clone()


class TalliesOnBothSides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.kept, self.last = nn.Linear(768, 8), Tallies(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(self.last(self.kept(self.first(x.flatten(1)))))


class KeepsWhatItReads(nn.Module):
    """In the trunk and behind the split: a module that sets a tensor at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kept, self.last = nn.Linear(768, 8), Keeps(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.kept(self.first(x.flatten(1)))
        return self.kept(self.last(x))


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach()
        return x * 2


REFUSED: dict[Callable[[], nn.Module], str] = {
    lambda: Around(FillsAList): r"body\.seen\[0\]",
    lambda: Around(FillsACache): r"body\.cache\.found\['bias'\]",
    lambda: Around(DrawsFromPython): "drawn once",
    lambda: Around(DrawsFromItsOwn): r"body\.generator",
    lambda: Around(Checkpoints): "checkpoints its own parts",
    lambda: Around(ReadsNumbers): "data pointer",
    lambda: Around(WritesUnderAView): "views of one another",
    KeepsWhatItReads: "share a module",
    lambda: Around(SetsAList): "sets a container of tensors",
    lambda: Around(DeletesAnAttribute): "deletes attributes",
}


@pytest.mark.parametrize(("factory", "why"), REFUSED.items(), ids=list(REFUSED.values()))
@pytest.mark.filterwarnings("ignore:given up")
def test_what_would_not_reach_every_sibling_is_refused_and_nothing_stays_of_it(
    factory: Callable[[], nn.Module], why: str
) -> None:
    model = fxcollab.transform(
        factory().double(), splits=["kept"] if factory is KeepsWhatItReads else ["first"], seed=1
    )
    batched = fxcollab.batch_branches(model)
    before = Snapshot.of(holders_of([batched.root, batched.peers]))
    values = copy.deepcopy(batched.state_dict())
    drawn = random.getstate()
    with pytest.raises(StateError, match=why):
        batched(X)
    assert random.getstate() == drawn
    assert [(holder.path, key) for holder, key in before.changed() if key not in ("seen", "_buffers")] == []
    assert_alike(batched.state_dict(), values)


def test_a_number_that_would_decide_of_types_is_refused() -> None:
    model = fxcollab.transform(Around(HasANumberOfAnotherType), splits=["first"], seed=1)
    assert model(X.float())[0].dtype == torch.float32
    with pytest.raises(StateError, match=r"a number of torch\.float64"):
        fxcollab.batch_branches(model)(X.float())


@pytest.mark.filterwarnings("ignore:given up")
def test_a_buffer_that_siblings_share_and_write_is_refused() -> None:
    model = fxcollab.transform(TalliesOnBothSides().double(), splits=["kept"], seed=1)
    with pytest.raises(StateError, match="a buffer is written that they share"):
        fxcollab.batch_branches(model)(X)


def test_hooks_of_all_modules_and_sparse_gradients_are_refused() -> None:
    _, batched = pair(SmallConvNet, **TREES["simple"])
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(StateError, match="hooks of all modules"):
            batched(X)
    finally:
        handle.remove()
    with pytest.raises(StateError, match=r"body\.table\.sparse"):
        pair(lambda: Around(LooksUpSparsely), splits=["first"])


def test_running_statistics_that_are_written_in_eval_mode() -> None:
    plain, batched = (model.eval() for model in pair(lambda: Around(NormsAlways), splits=["first"]))
    for _ in range(2):
        assert_alike(step(batched), step(plain))


class LooksUpSparsely(LooksUp):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 8, sparse=True)


class NormsAlways(Body):
    """Statistics of the batch, and running ones that a function writes, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.batch_norm(x, self.mean, self.var, training=True))


@pytest.mark.filterwarnings("ignore:given up")
def test_statistics_that_would_be_gathered_in_another_order_are_refused() -> None:
    model = fxcollab.transform(TrunkGoesOn(), "simple", ["first"], seed=1)
    with pytest.raises(PatternError, match="a module with state is called in several levels"):
        fxcollab.batch_branches(model)


def test_siblings_that_differ_are_refused_at_once() -> None:
    model = fxcollab.transform(SmallConvNet(), splits=["layer1"], seed=1)
    model.get_submodule("peers.b1.layer2.1").eps = 0.5
    with pytest.raises(StateError, match=r"layer2\.1\.eps"):
        fxcollab.batch_branches(model)


def test_under_saved_tensors_hooks_of_the_callers_own() -> None:
    plain, batched = pair(SmallConvNet, **TREES["simple"])
    with torch.autograd.graph.save_on_cpu():
        found = step(batched)
    assert_alike(found, step(plain))


@pytest.mark.parametrize(
    ("body", "training"),
    [(LooksUp, True), (LooksUp, False), (ReplacesABuffer, True), (ReplacesABuffer, False), (Attends, True)],
)
def test_compiled_hazards(body: type[Body], training: bool) -> None:
    plain, batched = (model.train(training) for model in pair(lambda: Around(body), splits=["first"]))
    compiled = torch.compile(batched, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found = step(compiled)
        assert_alike({name.replace("_orig_mod.", ""): value for name, value in found.items()}, step(plain))


@pytest.mark.parametrize("body", [HasPlainTensor, FillsAList])
def test_what_a_compiler_cannot_see_is_refused(body: type[Body]) -> None:
    _, batched = pair(lambda: Around(body), splits=["first"])
    with pytest.raises(Exception, match=r"fxcollab|BatchedTensor"):
        torch.compile(batched, fullgraph=True, backend="aot_eager")(X)


def test_an_error_inside_a_branch_leaves_its_state_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    _, batched = pair(SmallConvNet, **TREES["simple"])
    tensors = {**dict(batched.named_parameters()), **dict(batched.named_buffers())}
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:
            batched(X)
    assert "while branches ran as one" in caught.value.__notes__[0]
    now = {**dict(batched.named_parameters()), **dict(batched.named_buffers())}
    assert all(now[name] is tensor for name, tensor in tensors.items())
    batched(X)


def test_random_operations_draw_for_each_branch() -> None:
    class Dropping(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    model = fxcollab.transform(Dropping().double(), splits=["layer1", "layer2"], init="copy-anyway")
    outputs = fxcollab.batch_branches(model)(X)
    zeros = torch.stack([output == 0 for output in outputs])
    assert 0.2 < zeros.double().mean() < 0.8
    assert len({tuple(mask.flatten().tolist()) for mask in zeros}) == 4


def test_traced_and_exported_branches_run_one_after_the_other() -> None:
    plain, batched = pair(SkipNet, **TREES["hierarchical"])
    expected = plain.eval()(X)
    batched.eval()
    with torch.no_grad():
        again = torch.fx.symbolic_trace(batched)
        exported = torch.export.export(batched, (X,)).module()
        jitted = torch.jit.trace(batched, X)
        made = torch.fx.experimental.proxy_tensor.make_fx(batched)(X)
        for model in (again, exported, jitted, made):
            for found, output in zip(model(X), expected, strict=True):
                assert torch.equal(found, output)


def test_compiled_it_gives_the_same_numbers() -> None:
    plain, batched = pair(SmallConvNet, **TREES["hierarchical"])
    found = step(torch.compile(batched, fullgraph=True, backend="aot_eager"))
    assert_alike({name.replace("_orig_mod.", ""): value for name, value in found.items()}, step(plain))


def test_under_autocast() -> None:
    models = [model.float() for model in pair(SmallConvNet, **TREES["simple"])]
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (model(X.float()) for model in models)
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    assert_close(torch.stack(found), torch.stack(expected), rtol=0.05, atol=0.05)


def test_copies_run_as_one_too_and_a_saved_one_does_not(tmp_path: Path) -> None:
    plain, batched = pair(SmallConvNet, **TREES["hierarchical"])
    expected = step(copy.deepcopy(plain))
    for model in (copy.deepcopy(batched), copy.copy(batched), pickle.loads(pickle.dumps(batched))):
        assert model.batched and calls(model) == 2
        state = copy.deepcopy(model.state_dict())
        assert_alike(step(model), expected)
        model.load_state_dict(state)
    fxcollab.save(batched, tmp_path / "saved")
    assert "fxcollab_batched" not in (tmp_path / "saved" / "graph.py").read_text()
    assert not fxcollab.load(tmp_path / "saved", SmallConvNet().double()).batched


def test_each_mode_has_functions_of_its_own() -> None:
    class Moody(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x * 2 if self.training else x

    plain, batched = pair(Moody, **TREES["hierarchical"])
    assert batched.modes.differ and calls(batched) == 4
    assert_alike(step(batched), step(plain))
    assert_alike(step(batched.eval()), step(plain.eval()))


def test_a_frozen_head_stays_frozen() -> None:
    plain, batched = pair(SmallConvNet, **TREES["simple"])
    for model in (plain, batched):
        model.get_submodule("peers.b1").requires_grad_(False)
    found = step(batched)
    assert_alike(found, step(plain))
    assert not any(name.startswith("peers.b1.") for name in found)


def test_a_branch_in_another_mode_is_refused() -> None:
    _, batched = pair(SmallConvNet, **TREES["simple"])
    batched.get_submodule("peers.b1.layer2").eval()
    with pytest.raises(StateError, match=r"can't be run as one[^#]*layer2\.training[^#]*it is True in one and False"):
        batched(X)


def test_a_hook_on_one_sibling_is_refused() -> None:
    _, batched = pair(SmallConvNet, **TREES["simple"])
    batched.get_submodule("peers.b1.layer2").register_forward_hook(lambda *_: None)
    with pytest.raises(StateError, match=r"layer2\._forward_hooks[^#]*it would see the tensors of all"):
        batched(X)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_statistics_are_written_too(context: Callable[[], Any]) -> None:
    plain, batched = pair(SmallConvNet, **TREES["hierarchical"])
    with context():
        for found, expected in zip(batched(X), plain(X), strict=True):
            assert_close(found, expected)
    for name, buffer in plain.named_buffers():
        assert_close(batched.get_buffer(name), buffer)


def test_a_graph_whose_branches_differ_is_refused() -> None:
    plain, _ = pair(SmallConvNet, **TREES["simple"])
    node = next(node for node in plain.graph.nodes if node.name == "flatten_b1")
    node.args = (node.args[0], 2)
    with pytest.raises(StateError, match=r"don't compute the same[^#]*flatten_b1"):
        fxcollab.batch_branches(plain)


def test_what_is_computed_again_is_refused() -> None:
    model = fxcollab.transform(SmallConvNet(), splits=["layer1"], recompute="heads")
    with pytest.raises(PatternError, match="computed again can't run as one"):
        fxcollab.batch_branches(model)


class WritesLate(nn.Module):
    """The trunk writes into a value after what lies behind the split has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(768, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)) * 1.0
        z = torch.tanh(self.second(x)) + x
        x.add_(1)
        return self.third(z * x)


def test_a_write_that_would_come_too_early_is_refused() -> None:
    model = fxcollab.transform(WritesLate(), "simple", ["second"], granularity="op")
    with pytest.raises(PatternError, match=r"a value is written in place[^#]*add_"):
        fxcollab.batch_branches(model)


def test_no_run_is_refused() -> None:
    with pytest.raises(PatternError, match="Nothing is measured in 0 runs"):
        fxcollab.time_batched(pair(SmallConvNet, **TREES["simple"])[0], (X,), runs=0)


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=5
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).double().eval()
    tokens = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    plain = fxcollab.transform(model, "simple", ["bert.encoder.layer.0"], example_inputs=tokens, seed=1)
    batched = fxcollab.batch_branches(plain)
    for found, expected in zip(batched(**tokens), plain(**tokens), strict=True):
        assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-11)


def test_timing_leaves_the_model_as_it_was() -> None:
    plain, _ = pair(SmallConvNet, **TREES["simple"])
    state, generator = copy.deepcopy(plain.state_dict()), torch.get_rng_state()
    timing = fxcollab.time_batched(plain, (X,), runs=1)
    assert timing.plain > 0 and timing.batched > 0 and timing.ratio == timing.plain / timing.batched
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
