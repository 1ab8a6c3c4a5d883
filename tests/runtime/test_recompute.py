"""Branches that are computed again in the backward pass: the same numbers, every effect once, less memory."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fxcollab
from fxcollab.costs.profile import backward
from fxcollab.costs.summary import summarise
from fxcollab.errors import PatternError, StateError
from fxcollab.runtime.recompute import recompute as runtime
from fxcollab.tracing.examples import run_on_twin
from fxcollab.tracing.interface import InputSpec, Interface
from samples.networks.resnet_cifar import resnet_cifar
from tests.live_bytes import LiveBytes
from tests.references import SkipNet, SmallConvNet
from tests.runtime.recompute_helpers import (
    TREES,
    Dropping,
    Remembering,
    RememberingNet,
    X,
    assert_equal,
    loss_of,
    nothing_computed_again,
    pair,
    step,
)
from tests.speeds import slow_but


@pytest.mark.parametrize("tree", slow_but(["fan-outs", "instances"], TREES))
def test_gradients_and_statistics_are_those_of_the_plain_step_bit_for_bit(tree: str) -> None:
    plain, again = pair(SmallConvNet, **TREES[tree])
    assert_equal(step(again), step(plain))


@pytest.mark.parametrize("tree", slow_but(["fan-outs"], TREES))
def test_where_a_branch_reads_a_value_twice_sums_are_those_of_one_branch_after_the_other(
    tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, again = pair(SkipNet, **TREES[tree])
    state = copy.deepcopy(again.state_dict())
    with nothing_computed_again(monkeypatch):
        expected = step(again)
    again.load_state_dict(state)
    assert_equal(step(again), expected)


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
def test_where_a_branch_reads_a_value_twice_gradients_are_the_plain_ones_to_rounding(tree: str) -> None:
    plain, again = pair(lambda: SkipNet().double(), **TREES[tree])
    expected, found = step(plain, X.double()), step(again, X.double())
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_second_step_goes_on_from_the_same_statistics() -> None:
    plain, again = pair(SmallConvNet, **TREES["hierarchical"])
    for _ in range(2):
        expected, found = step(plain), step(again)
    assert_equal(found, expected)


@pytest.mark.slow
def test_opened_branches_give_the_plain_gradients_to_rounding() -> None:
    plain, again = pair(lambda: resnet_cifar(8).double(), splits=["stage1", "stage2"], granularity="op")
    x = X.double()
    expected, found = step(plain, x), step(again, x)
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


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
        gradients = torch.autograd.grad(loss_of(fxcollab.all_heads(model)(X)), parameters, create_graph=True)
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
            fxcollab.all_heads(again.eval())(X)
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
    plain.eval().returns_all = again.eval().returns_all = True
    assert_equal(step(again), step(plain))
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
        "fc_b1 = fxcollab_recompute(branch_b1, (self.peers.b1.layer2, self.peers.b1.layer3, self.peers.b1.pool, "
        "self.peers.b1.fc), rescale)",
    ]


def test_the_graph_is_the_plain_one() -> None:
    plain, again = pair(SkipNet, **TREES["hierarchical"])
    assert [str(node.format_node()) for node in again.graph.nodes] == [
        str(n.format_node()) for n in plain.graph.nodes
    ]
    assert plain.code != again.code
    assert fxcollab.prune(again).code == fxcollab.prune(plain).code


@pytest.mark.parametrize("factory", slow_but([SkipNet], [SmallConvNet, SkipNet]))
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


@pytest.mark.slow
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
        model.returns_all = True
        torch.manual_seed(0)
        state = dict(model.named_parameters())
        found.append(torch.func.grad(lambda s, m=model: loss_of(torch.func.functional_call(m, s, X)))(state))
    for name in state:
        assert_close(found[1][name], found[0][name])


def test_an_exported_model_holds_plain_operators() -> None:
    plain, again = pair(SmallConvNet, **TREES["hierarchical"])
    exported = torch.export.export(again.eval(), (X,)).module()
    assert_close(exported(X), plain.eval()(X))


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


def test_another_name_is_refused() -> None:
    with pytest.raises(PatternError, match="'all'"):
        fxcollab.transform(SmallConvNet(), splits=["layer1"], recompute="all")  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="'all'"):
        fxcollab.training_costs(SmallConvNet(), splits=["layer1"], recompute="all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ((0, 1), StateError, "'add' belongs to no head"),
        ((0, 0), PatternError, "(?s)'add' of the branch.*another pass"),
    ],
    ids=["of two branches", "behind other branches"],
)
def test_a_node_added_where_no_branch_can_take_it_is_refused(
    heads: tuple[int, int], error: type[Exception], message: str
) -> None:
    _, again = pair(SmallConvNet, **TREES["simple"])
    output = next(iter(reversed(again.graph.nodes)))
    with again.graph.inserting_before(output):
        again.graph.call_function(torch.add, tuple(output.args[0][head] for head in heads))
    with pytest.raises(error, match=message):
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


@pytest.mark.parametrize("depth", slow_but([8], [8, 20]))
@pytest.mark.parametrize(
    "options",
    slow_but(
        ["hierarchical"],
        [
            pytest.param({"splits": ["stage1", "stage2"]}, id="hierarchical"),
            pytest.param({"splits": ["stage1", "stage2"], "fanouts": (3, 2)}, id="fan-outs"),
            pytest.param({"pattern": "simple", "splits": ["stage1"], "heads": 4}, id="simple"),
            pytest.param({"pattern": "multi-instance", "heads": 3}, id="instances"),
        ],
    ),
)
def test_costs_are_those_of_the_built_step(options: dict[str, Any], depth: int) -> None:
    with torch.device("meta"):
        train_model = fxcollab.transform(resnet_cifar(depth), seed=0, recompute="heads", **options)
        costs = fxcollab.training_costs(
            resnet_cifar(depth),
            example_inputs=(torch.empty(16, 3, 32, 32),),
            optimizer=0,
            recompute="heads",
            **options,
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
        run_on_twin(train_model, INTERFACE, run=flops)
        run_on_twin(train_model, INTERFACE, run=memory)  # by itself: the counter of FLOPs holds on to tensors
    assert costs.memory == pytest.approx(peaks[0], rel=0.05)
    last = 16 * linear_flops(64, 10) * train_model.meta["fxcollab"].tree.heads
    assert costs.flops == counter.get_total_flops() + last  # a second pass ends before the last product


def test_the_summary_says_so() -> None:
    _, again = pair(SmallConvNet, **TREES["hierarchical"])
    assert summarise(again).recompute == "heads"
