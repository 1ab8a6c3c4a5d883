"""Branches that are computed again in the backward pass: the same numbers, every effect once, less memory."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import random
from collections import UserList, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fxcollab
from fxcollab.costs.attribution import backward
from fxcollab.costs.summary import summarise
from fxcollab.errors import PatternError, StateError
from fxcollab.runtime.recompute import recompute as runtime
from fxcollab.tracing.examples import run_on_fakes
from fxcollab.tracing.interface import InputSpec, Interface
from samples.networks.resnet_cifar import resnet20, resnet_cifar
from tests.live_bytes import LiveBytes
from tests.networks import TrunkGoesOn
from tests.references import SkipNet, SmallConvNet

X, LABELS = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
TREES: dict[str, dict[str, Any]] = {
    "hierarchical": {"splits": ["layer1", "layer2"]},
    "fan-outs": {"splits": ["layer1", "layer2"], "fanouts": (3, 2)},
    "simple": {"pattern": "simple", "splits": ["layer1"], "heads": 4},
    "instances": {"pattern": "multi-instance", "heads": 3},
}


def pair(
    factory: Callable[[], nn.Module], **options: Any
) -> tuple[fxcollab.CollabGraphModule, fxcollab.CollabGraphModule]:
    """The same training model, plain and with branches that are computed again."""
    torch.manual_seed(0)
    model = factory()
    plain = fxcollab.transform(model, seed=1, **options)
    again = fxcollab.transform(copy.deepcopy(model), seed=1, recompute="heads", **options)
    again.load_state_dict(plain.state_dict())
    return plain, again


def loss_of(outputs: Any) -> Tensor:
    return torch.stack([F.cross_entropy(output, LABELS) for output in outputs]).sum()


def step(model: nn.Module, x: Tensor = X, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of a step, and the buffers after it."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss_of(model(x)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@contextmanager
def nothing_computed_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same statements in the same order, each branch called as it is."""
    with monkeypatch.context() as patch:
        module = importlib.import_module("fxcollab.runtime.recompute")
        patch.setattr(module, "checkpoint", lambda branch, *inputs, **options: branch(*inputs))
        yield


@pytest.mark.parametrize("tree", TREES)
def test_gradients_and_statistics_are_those_of_the_plain_step_bit_for_bit(tree: str) -> None:
    plain, again = pair(SmallConvNet, **TREES[tree])
    assert_equal(step(again), step(plain))


@pytest.mark.parametrize("tree", TREES)
def test_where_a_branch_reads_a_value_twice_sums_are_those_of_one_branch_after_the_other(
    tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, again = pair(SkipNet, **TREES[tree])
    state = copy.deepcopy(again.state_dict())
    with nothing_computed_again(monkeypatch):
        expected = step(again)
    again.load_state_dict(state)
    assert_equal(step(again), expected)


@pytest.mark.parametrize("tree", TREES)
def test_where_a_branch_reads_a_value_twice_gradients_are_the_plain_ones_to_rounding(tree: str) -> None:
    plain, again = pair(lambda: SkipNet().double(), **TREES[tree])
    expected, found = step(plain, X.double()), step(again, X.double())
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_a_second_step_goes_on_from_the_same_statistics() -> None:
    plain, again = pair(SmallConvNet, **TREES["hierarchical"])
    for _ in range(2):
        expected, found = step(plain), step(again)
    assert_equal(found, expected)


def test_opened_branches_give_the_plain_gradients_to_rounding() -> None:
    plain, again = pair(lambda: resnet_cifar(8).double(), splits=["stage1", "stage2"], granularity="op")
    x = X.double()
    expected, found = step(plain, x), step(again, x)
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


class Dropping(nn.Module):
    """Random numbers in the trunk and behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(768, 8), nn.Linear(8, 8)
        self.third = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.first(x.flatten(1))), 0.3, self.training)
        x = F.dropout(torch.tanh(self.second(x)), 0.4, self.training)
        return self.third(x * torch.rand_like(x))


def test_random_numbers_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, again = pair(Dropping, splits=["first", "second"])
    with nothing_computed_again(monkeypatch):
        expected = step(again)
        following = torch.rand(3)
    assert_equal(step(again), expected)
    assert torch.equal(torch.rand(3), following)


class Drawing(nn.Module):
    """Draws from Python's generator, inside a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * random.random()


class DrawingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drawing, self.last = nn.Linear(768, 8), Drawing(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drawing(self.first(x.flatten(1))))


def test_pythons_random_numbers_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, again = pair(DrawingNet, pattern="simple", splits=["first"])
    found = []
    for patched in (True, False):
        random.seed(3)
        if patched:
            with nothing_computed_again(monkeypatch):
                found.append(step(again))
        else:
            found.append(step(again))
        found[-1] |= {"following": torch.tensor(random.random())}
    assert_equal(found[1], found[0])


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


@pytest.mark.parametrize("granularity", ["auto", "op"])
@pytest.mark.filterwarnings("ignore:limitation")
def test_state_that_a_branch_reads_and_writes_is_read_as_it_was_and_written_once(granularity: str) -> None:
    plain, again = pair(RememberingNet, pattern="simple", splits=["first"], granularity=granularity)
    for _ in range(2):
        expected, found = step(plain), step(again)
    assert_equal(found, expected)
    assert found["memory.scale"][0] == 0.25


class Holding(nn.Module):
    """Keeps things between calls wherever Python can, and computes with all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls, self.seen = nn.Linear(8, 8), 0, torch.ones(8)
        self.cache: dict[str, list[Tensor]] = {"means": []}
        self.box = SimpleNamespace(count=0, pairs=deque([(torch.zeros(8), 0)], maxlen=2))
        self.own = torch.Generator().manual_seed(3)
        self.foreign, self.python = np.random.default_rng(4), random.Random(5)
        self.table = np.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.box.count += 2
        self.table *= 0.5
        y = torch.tanh(self.fc(x)) * self.seen.clone() * self.calls + self.box.count + float(self.table[0])
        y = y + torch.stack([*self.cache["means"], *(pair[0].mean() for pair in self.box.pairs)]).sum()
        self.cache["means"].append(y.mean().detach())
        self.box.pairs.append((y.detach()[0], self.calls))
        self.seen.mul_(0.9)
        noise = torch.rand(8, generator=self.own) + self.foreign.random() + self.python.random()
        return torch.sin(y) * noise.to(y.dtype)


class HoldingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.holding, self.last = nn.Linear(768, 8), Holding(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.holding(self.first(x.flatten(1))))


def test_whatever_a_module_holds_is_as_it_was_in_the_second_pass() -> None:
    plain, again = pair(HoldingNet, pattern="simple", splits=["first"])
    for _ in range(3):
        expected, found = step(plain), step(again)
        assert_equal(found, expected)
    for name in ("holding", "peers.b1.holding"):
        here, there = again.get_submodule(name), plain.get_submodule(name)
        assert here.calls == there.calls == 3 and here.box.count == there.box.count == 6
        assert len(here.cache["means"]) == len(there.cache["means"]) == 3
        assert here.python.random() == there.python.random()
        assert torch.equal(here.seen, there.seen) and (here.table == there.table).all()


class Notes(dict[str, int]):
    """A dictionary of the user's."""


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class State(NamedTuple):
    seen: Tensor


class HoldsRareThings(nn.Module):
    """Subclasses of containers, slots, tensors in tuples, views, and what belongs to the class."""

    total = 0
    table: ClassVar[dict[str, int]] = {"calls": 0}

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.notes, self.slotted, self.state = nn.Linear(8, 8), Notes(n=0), Slotted(), State(torch.ones(8))
        self.listed = UserList([0])
        grid = torch.ones(2, 8)
        self.register_buffer("grid", grid)
        self.register_buffer("row", grid[0])

    def forward(self, x: Tensor) -> Tensor:
        type(self).total += 1
        self.table["calls"] += 1
        self.notes["n"] += 1
        self.slotted.count += 1
        self.listed[0] += 1
        self.state.seen.mul_(0.9)
        self.grid.mul_(0.8)
        scale = self.notes["n"] + self.slotted.count + self.listed[0] + self.total + self.table["calls"]
        return torch.tanh(self.fc(x)) * scale * self.state.seen.clone() * self.row.clone()


class RareNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare, self.last = nn.Linear(768, 8), HoldsRareThings(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rare(self.first(x.flatten(1))))


def test_rare_things_are_as_they_were_too() -> None:
    found = []
    for model in pair(RareNet, pattern="simple", splits=["first"]):
        HoldsRareThings.total, HoldsRareThings.table["calls"] = 0, 0
        found.append([step(model) for _ in range(2)][-1])
        assert HoldsRareThings.total == HoldsRareThings.table["calls"] == 4
    assert_equal(found[1], found[0])


class Averages(nn.Module):
    """A running mean of the user's own, which is read once it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.no_grad():
            self.mean.lerp_(y.mean(0), 0.1)
        return torch.tanh(y - self.mean)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.fc(x)) * self.calls


class Around(nn.Module):
    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(768, 8), body(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x.flatten(1))))


@pytest.mark.parametrize("body", [Averages, Counts, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))])
@pytest.mark.filterwarnings("ignore:no module initialises")
def test_what_a_compiler_cannot_compute_again_runs_as_it_is(body: Callable[[], nn.Module]) -> None:
    plain, again = pair(lambda: Around(body), pattern="simple", splits=["first"])
    compiled = torch.compile(again, backend="aot_eager")
    for _ in range(2):
        expected, found = step(plain), step(compiled)
        for name, value in expected.items():
            assert_close(found[f"_orig_mod.{name}"], value)


def test_weights_that_were_changed_before_the_backward_are_refused() -> None:
    _, again = pair(lambda: Around(Counts), pattern="simple", splits=["first"])
    loss = loss_of(again(X))
    with torch.no_grad():
        again.get_parameter("peers.b1.body.fc.weight").mul_(2)
    with pytest.raises(StateError, match=r"(?s)written since the forward.*branch_b1, Linear\.weight"):
        loss.backward()


class CallsLate(nn.Module):
    """The trunk calls a module that counts after what lies behind the split has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.counts, self.last = nn.Linear(768, 8), nn.Linear(8, 8), Counts(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        return self.last(self.counts(self.first(x)) + self.counts(x))


class HoldsAnIterator(Averages):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(1000))


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        (CallsLate, "a module with state is called in several"),
        (lambda: Around(HoldsAnIterator), "numbers is an iterator"),
    ],
)
@pytest.mark.filterwarnings("ignore:limitation")
def test_state_that_would_be_another_in_the_second_pass_is_refused(
    factory: Callable[[], nn.Module], why: str
) -> None:
    with pytest.raises(PatternError, match=f"(?s)can't be computed again.*{why}|{why}"):
        fxcollab.transform(factory(), "simple", ["first"], recompute="heads")


class CalledOnBothSides(nn.Module):
    """A BatchNorm and a weight that are used in the trunk and behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.norm = nn.Linear(768, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.norm(self.embed(x.flatten(1)))))
        return self.last(self.norm(torch.tanh(self.second(x))))


@pytest.mark.filterwarnings("ignore:limitation")
def test_what_is_used_on_both_sides_of_a_split_is_computed_again() -> None:
    plain, again = pair(lambda: CalledOnBothSides().double(), pattern="simple", splits=["first"], heads=3)
    for _ in range(2):
        expected, found = step(plain, X.double()), step(again, X.double())
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:limitation")
def test_statistics_that_would_be_gathered_in_another_order_are_refused() -> None:
    with pytest.raises(PatternError, match=r"(?s)can't be computed again.*norm_1.*'norm'"):
        fxcollab.transform(TrunkGoesOn(), "simple", ["first"], recompute="heads")


def test_a_mode_that_changes_before_the_backward_changes_nothing() -> None:
    plain, again = pair(SmallConvNet, **TREES["simple"])
    expected = step(plain)
    loss = loss_of(again(X))
    again.eval()
    loss.backward()
    assert_equal(
        {name: p.grad for name, p in again.named_parameters()}, {n: expected[n] for n, _ in again.named_parameters()}
    )
    assert not any(module.training for module in again.modules())


class WritesItsWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


def test_a_forward_that_writes_into_a_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), WritesItsWeight(8, 5))
    again = fxcollab.transform(model, "simple", ["1"], recompute="heads")
    with pytest.raises(StateError, match=r"(?s)writes into a parameter.*WritesItsWeight.weight"):
        again(X)


def test_a_backward_can_be_run_twice() -> None:
    plain, again = pair(RememberingNet, pattern="simple", splits=["first"])
    found = []
    for model in (plain, again):
        loss = loss_of(model(X))
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
        found.append({f"{i}": tensor for i, tensor in enumerate((*first, *second))})
    assert_equal(found[1], found[0])


def test_gradients_of_gradients() -> None:
    plain, again = pair(Dropping, splits=["first", "second"])
    found = []
    for model in (plain.eval(), again.eval()):
        torch.manual_seed(0)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss_of(model(X)), parameters, create_graph=True)
        penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        found.append(torch.autograd.grad(penalty, parameters))
    for expected, value in zip(*found, strict=True):
        assert_close(value, expected)


def test_only_what_branches_begin_with_is_kept_for_the_backward() -> None:
    kept = []
    for model in pair(SmallConvNet, **TREES["instances"]):
        storages: dict[int, int] = {}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: Tensor, storages: dict[int, int] = storages, known: set[int] = parameters) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(X)
        kept.append(sum(storages.values()))
    assert kept[1] <= X.nbytes < 0.1 * kept[0]


def test_nothing_is_computed_again_without_gradients() -> None:
    _, again = pair(SmallConvNet, **TREES["hierarchical"])
    counts = []
    for context in (torch.no_grad, torch.inference_mode):
        with context(), FlopCounterMode(display=False) as counter:
            again.eval()(X)
        counts.append(counter.get_total_flops())
    plain = fxcollab.prune(again)
    with FlopCounterMode(display=False) as counter:
        plain(X)
    assert counts[0] == counts[1] > counter.get_total_flops()


def test_the_other_mode_has_branches_of_its_own() -> None:
    class Moody(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return F.dropout(x, 0.5) if self.training else x

    plain, again = pair(Moody, **TREES["hierarchical"])
    assert again.modes.differ
    assert_equal(step(again.eval()), step(plain.eval()))
    assert again.code.count("fxcollab_recompute(") == 12


def test_the_code_is_a_function_a_branch() -> None:
    _, again = pair(SmallConvNet, **TREES["simple"])
    lines = [line.partition(";  ")[0].strip() for line in again.code.splitlines()]
    start = lines.index("def branch_b1(rescale):")
    assert lines[start + 1 : start + 8] == [
        "layer2_b1 = self.peers.b1.layer2(rescale)",
        "layer3_b1 = self.peers.b1.layer3(layer2_b1)",
        "pool_b1 = self.peers.b1.pool(layer3_b1)",
        "flatten_b1 = torch.flatten(pool_b1, 1)",
        "fc_b1 = self.peers.b1.fc(flatten_b1)",
        "return fc_b1",
        "fc_b1 = fxcollab_recompute(branch_b1, (self.peers.b1.layer2, self.peers.b1.layer3), rescale)",
    ]


def test_the_graph_is_the_plain_one() -> None:
    plain, again = pair(SkipNet, **TREES["hierarchical"])
    assert [str(node.format_node()) for node in again.graph.nodes] == [
        str(n.format_node()) for n in plain.graph.nodes
    ]
    assert plain.code != again.code
    assert fxcollab.prune(again).code == fxcollab.prune(plain).code


@pytest.mark.parametrize("factory", [SmallConvNet, SkipNet])
def test_it_is_proved(factory: Callable[[], nn.Module]) -> None:
    model = factory()
    train_model = fxcollab.transform(model, splits=["layer1", "layer2"], recompute="heads")
    assert fxcollab.verify(model, train_model, (X,))


def copied(model: fxcollab.CollabGraphModule, folder: Path) -> Iterator[fxcollab.CollabGraphModule]:
    yield copy.deepcopy(model)
    yield copy.copy(model)
    yield pickle.loads(pickle.dumps(model))
    fxcollab.save(model, folder / "saved")
    yield fxcollab.load(folder / "saved", SmallConvNet())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


def test_copies_and_saved_ones_compute_again_too(tmp_path: Path) -> None:
    plain, again = pair(SmallConvNet, **TREES["hierarchical"])
    state = copy.deepcopy(plain.state_dict())
    expected = step(plain)
    for model in copied(again, tmp_path):
        assert model.recompute == "heads"
        assert model.code == again.code
        model.load_state_dict(state)
        assert_equal(step(model), expected)


def test_compiled_gradients_and_statistics() -> None:
    plain, again = pair(SmallConvNet, **TREES["hierarchical"])
    torch._dynamo.reset()
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    expected = step(plain)
    step(compiled)  # type: ignore[arg-type]
    found = {name: p.grad for name, p in again.named_parameters()} | dict(again.named_buffers())
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert all(int(value) == 1 for name, value in found.items() if name.endswith("num_batches_tracked"))


def test_autocast_gradients_are_the_plain_ones() -> None:
    plain, again = pair(SmallConvNet, **TREES["hierarchical"])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = plain(X), again(X)
    for output in outputs:
        loss_of(head.float() for head in output).backward()
    assert_equal(
        {name: parameter.grad for name, parameter in again.named_parameters()},
        {name: parameter.grad for name, parameter in plain.named_parameters()},
    )


def test_where_no_saved_tensor_can_be_replaced_branches_run_as_they_are() -> None:
    plain, again = pair(Dropping, splits=["first", "second"])
    plain.eval(), again.eval()
    found = []
    for model in (plain, again):
        torch.manual_seed(0)
        state = dict(model.named_parameters())
        found.append(torch.func.grad(lambda s, m=model: loss_of(torch.func.functional_call(m, s, X)))(state))
    for name in state:
        assert_close(found[1][name], found[0][name])


def test_an_exported_model_holds_plain_operators() -> None:
    plain, again = pair(SmallConvNet, **TREES["hierarchical"])
    exported = torch.export.export(again.eval(), (X,)).module()
    for found, expected in zip(exported(X), plain.eval()(X), strict=True):
        assert_close(found, expected)


def test_names_of_the_models_own_don_t_collide() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch_b0 = nn.Linear(768, 8), nn.Linear(8, 5)

        def forward(self, branch_b1: Tensor) -> Tensor:
            return self.branch_b0(self.first(branch_b1.flatten(1)))

    plain, again = pair(Named, pattern="simple", splits=["first"])
    assert_equal(step(again), step(plain))


def test_several_values_nested_outputs_and_plain_values_cross() -> None:
    class Nested(SmallConvNet):
        def forward(self, x: Tensor) -> Any:
            y = self.layer1(self.relu(self.bn1(self.conv1(x))))
            size = y.shape[2:]
            z = self.layer2(y)
            up = F.interpolate(z, size)
            w = self.layer3(z)
            return {"logits": self.fc(self.pool(w).flatten(1)), "maps": [F.interpolate(w, size) + up.mean()]}

    plain, again = pair(Nested, **TREES["hierarchical"])
    found = []
    for model in (plain, again):
        outputs = model(X)
        torch.stack(
            [out["logits"].square().sum() + out["maps"][0].square().mean() for out in outputs]
        ).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name in found[0]:
        assert_close(found[1][name], found[0][name])


class WritesLate(nn.Module):
    """The trunk writes into a value after what lies behind the split has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(768, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)) * 1.0
        y = self.second(x)
        z = torch.tanh(y) + x
        x.add_(1)
        return self.third(z * x)


def test_a_write_that_branches_must_not_see_is_refused() -> None:
    model = WritesLate()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(PatternError, match="can't be computed again") as caught:
        fxcollab.transform(model, "simple", ["second"], recompute="heads", granularity="op")
    assert "add_" in str(caught.value) and "'x'" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == names


def test_another_name_and_a_budget_are_refused() -> None:
    with pytest.raises(PatternError, match="'all'"):
        fxcollab.transform(SmallConvNet(), splits=["layer1"], recompute="all")  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="'all'"):
        fxcollab.training_costs(SmallConvNet(), splits=["layer1"], recompute="all")  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="budget"):
        fxcollab.transform(SmallConvNet(), splits="auto", recompute="heads", max_memory=1.2)


def test_a_node_without_a_branch_is_refused() -> None:
    _, again = pair(SmallConvNet, **TREES["simple"])
    output = next(iter(reversed(again.graph.nodes)))
    with again.graph.inserting_before(output):
        again.graph.call_function(torch.neg, (output.args[0][0],))
    with pytest.raises(StateError, match="neg"):
        again.recompile()


def test_state_is_copied_for_the_second_pass_alone() -> None:
    module = Remembering()
    before = module.scale
    x = torch.randn(2, 8)
    runtime(lambda value: module(value), (module,), x).sum().backward()
    assert module.scale is before
    assert before[0] == 0.5


def linear_flops(inputs: int, outputs: int) -> int:
    """Of a linear layer's forward, an image."""
    return 2 * inputs * outputs


INTERFACE = Interface((InputSpec("x", (16, 3, 32, 32), "float32"),))


@pytest.mark.parametrize(
    "options",
    [
        {"splits": ["stage1", "stage2"]},
        {"splits": ["stage1", "stage2"], "fanouts": (3, 2)},
        {"pattern": "simple", "splits": ["stage1"], "heads": 4},
        {"pattern": "multi-instance", "heads": 3},
    ],
    ids=["hierarchical", "fan-outs", "simple", "instances"],
)
def test_costs_are_those_of_the_built_step(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        train_model = fxcollab.transform(resnet20(), seed=0, recompute="heads", **options)
        costs = fxcollab.training_costs(
            resnet20(), example_inputs=(torch.empty(16, 3, 32, 32),), optimizer=0, recompute="heads", **options
        ).training
    counter, peaks = FlopCounterMode(display=False), []

    def flops(model: nn.Module, *inputs: Tensor) -> None:
        with counter:
            backward(model(*inputs))

    def memory(model: nn.Module, *inputs: Tensor) -> None:
        with LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as live:
            backward(model(*inputs))
        peaks.append(live.peak)

    with train_model.in_mode(True):
        run_on_fakes(train_model, INTERFACE, run=flops)
        run_on_fakes(train_model, INTERFACE, run=memory)  # by itself: the counter of FLOPs holds on to tensors
    assert costs.memory == pytest.approx(peaks[0], rel=0.05)
    last = 16 * linear_flops(64, 10) * train_model.meta["fxcollab"].tree.heads
    assert costs.flops == counter.get_total_flops() + last  # a second pass ends before the last product


def test_the_summary_says_so() -> None:
    _, again = pair(SmallConvNet, **TREES["hierarchical"])
    assert summarise(again).recompute == "heads"
