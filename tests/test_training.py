"""A training model trains like any module: whoever compiles, casts, averages or checkpoints it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fxcollab
from samples.networks import densenet_cifar, resnet_cifar
from tests.references import SkipNet, SmallConvNet
from tests.speeds import slow_but
from tests.training_helpers import CLASSES, Mlp, assert_same_gradients, batch, gradients, mlp, mlp_batch, train

pytestmark = pytest.mark.usefixtures("no_compiled_leftovers")


class Checkpointed(nn.Module):
    """A net that checkpoints a segment itself, inside a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = CheckpointedBody()
        self.tail = CheckpointedBody()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tail(self.body(self.stem(x))).mean((2, 3)))


class CheckpointedBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: F.relu(self.norm(self.conv(y))), x, use_reentrant=False)


MODELS: dict[str, Callable[[], fxcollab.CollabGraphModule]] = {
    "tree": lambda: transformed(SmallConvNet, splits=["layer1", "layer2"], fanouts=(2, 3)),
    "skips": lambda: transformed(SkipNet, splits=["layer1", "layer2"]),
    "simple": lambda: transformed(SmallConvNet, pattern="simple", splits=["layer2"], heads=3),
    "instances": lambda: transformed(SmallConvNet, pattern="multi-instance"),
    "resnet": lambda: transformed(lambda: resnet_cifar(8, CLASSES), splits=["stage1", "stage2"], granularity="op"),
    "densenet": lambda: transformed(lambda: densenet_cifar(7, 4, CLASSES), pattern="simple", splits=["block1.0"]),
    "checkpointed": lambda: transformed(Checkpointed, pattern="simple", splits=["body"], heads=3),
}


def transformed(factory: Callable[[], nn.Module], **options: Any) -> fxcollab.CollabGraphModule:
    torch.manual_seed(0)
    return fxcollab.transform(factory, **options, seed=7)


@pytest.fixture(params=MODELS)
def train_model(request: pytest.FixtureRequest) -> fxcollab.CollabGraphModule:
    return MODELS[request.param]()


# --------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("train_model", slow_but(["tree"], MODELS), indirect=True)
def test_training_lowers_the_loss_and_moves_every_parameter(train_model: fxcollab.CollabGraphModule) -> None:
    before = {name: p.detach().clone() for name, p in train_model.named_parameters()}
    losses = train(train_model, train_model.parameters(), steps=12)
    assert losses[-1] < losses[0] - 0.3  # the soft term has a floor, the heads' own entropy
    still = [name for name, p in train_model.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize("train_model", slow_but(["instances"], MODELS), indirect=True)
def test_every_head_learns(train_model: fxcollab.CollabGraphModule) -> None:
    x, target = batch()
    before = [F.cross_entropy(z, target).item() for z in train_model(x)]
    train(train_model, train_model.parameters(), steps=12)
    after = [F.cross_entropy(z, target).item() for z in train_model(x)]
    assert all(new < old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("train_model", slow_but(["tree"], MODELS), indirect=True)
def test_compiled_gradients_equal_eagers(train_model: fxcollab.CollabGraphModule) -> None:
    train_model.double()
    expected = gradients(train_model, train_model)
    compiled = torch.compile(train_model, fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(compiled, train_model), expected)


@pytest.mark.slow
def test_compiled_training_lowers_the_loss_and_follows_the_mode() -> None:
    train_model, twin = MODELS["skips"](), MODELS["skips"]()
    compiled = torch.compile(train_model, fullgraph=True, backend="aot_eager")
    losses = train(compiled, compiled.parameters())
    assert_close(losses, train(twin, twin.parameters()), rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]
    compiled.eval(), twin.eval()
    with torch.no_grad():
        outputs, expected_ones = (fxcollab.all_heads(each)(batch()[0]) for each in (compiled, twin))
        for output, expected in zip(outputs, expected_ones, strict=True):
            assert_close(output, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_training_compiled_by_inductor() -> None:
    train_model, twin = mlp(), mlp()
    compiled = torch.compile(train_model, fullgraph=True)
    losses = train(compiled, compiled.parameters(), steps=4, data=mlp_batch())
    assert_close(losses, train(twin, twin.parameters(), steps=4, data=mlp_batch()))


@pytest.mark.slow
def test_loss_and_model_compile_together() -> None:
    train_model = MODELS["simple"]().double()
    loss = fxcollab.CollaborativeLoss()
    x, target = batch(torch.float64)
    expected = gradients(train_model, train_model)
    step = torch.compile(lambda x, y: loss(train_model(x), y), fullgraph=True, backend="aot_eager")
    train_model.zero_grad()
    step(x, target).backward()
    assert_same_gradients({name: p.grad for name, p in train_model.named_parameters()}, expected)


@pytest.mark.parametrize("train_model", slow_but(["tree"], MODELS), indirect=True)
def test_autocast_training_lowers_the_loss(train_model: fxcollab.CollabGraphModule) -> None:
    def model(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return train_model(x)

    assert all(output.dtype == torch.bfloat16 for output in model(batch()[0]))
    losses = train(model, train_model.parameters(), steps=12)
    assert losses[-1] < losses[0] - 0.3  # the soft term has a floor, the heads' own entropy
    assert all(p.dtype == torch.float32 for p in train_model.parameters())


def test_pure_bf16_training_lowers_the_loss() -> None:
    train_model = MODELS["skips"]().bfloat16()
    x, target = batch(torch.bfloat16)
    losses = train(train_model, train_model.parameters(), steps=12, data=(x, target))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("train_model", slow_but(["tree", "skips", "instances"], MODELS), indirect=True)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_equal_the_plain_ones(
    train_model: fxcollab.CollabGraphModule, reentrant: bool
) -> None:
    train_model.double()
    expected = gradients(train_model, train_model)

    def run(x: Tensor) -> Any:
        return checkpoint(train_model, x.requires_grad_(), use_reentrant=reentrant)

    assert_same_gradients(gradients(run, train_model), expected)


def test_checkpoint_wrappers_inside_keep_gradients_and_prune() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    train_model = MODELS["skips"]().double()
    expected, plain = gradients(train_model, train_model), list(train_model.state_dict())
    original = SkipNet().double()
    apply_activation_checkpointing(train_model, check_fn=lambda module: isinstance(module, nn.Sequential))
    assert any("_checkpoint_wrapped_module" in name for name, _ in train_model.named_modules())
    found = gradients(train_model, train_model)
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}
    assert_same_gradients(found, expected)
    assert [name.replace("_checkpoint_wrapped_module.", "") for name in train_model.state_dict()] == plain
    for head in range(4):
        original.load_state_dict(fxcollab.prune_state_dict(train_model.state_dict(), head), strict=True)


def test_checkpoint_wrappers_of_the_original_are_in_every_head() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, x = nn.Sequential(nn.Linear(4, 4), checkpoint_wrapper(nn.Linear(4, 4)), nn.Linear(4, 2)), torch.randn(3, 4)
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    fxcollab.verify(model, train_model, (x,)).raise_if_failed()
    expected = fxcollab.all_heads(train_model.eval())(x)[1]
    assert torch.equal(fxcollab.prune(train_model, 1, into=model)(x), expected)


def test_average_of_the_weights_prunes_like_the_weights() -> None:
    train_model = MODELS["tree"]()
    average = AveragedModel(train_model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    start = {name: value.clone() for name, value in train_model.state_dict().items()}
    train(train_model, train_model.parameters(), steps=3, each=lambda: average.update_parameters(train_model))
    inside = average.module
    assert isinstance(inside, fxcollab.CollabGraphModule)
    assert list(inside.state_dict()) == list(start)
    assert not torch.equal(inside.conv1.weight, train_model.conv1.weight)
    x = batch()[0]
    average.eval()
    for head, output in enumerate(fxcollab.all_heads(average)(x)):
        original = SmallConvNet().eval()
        original.load_state_dict(fxcollab.prune_state_dict(average.state_dict(), head), strict=True)
        assert torch.equal(original(x), output)
        assert torch.equal(fxcollab.prune(average, head)(x), output)


def test_gradient_accumulation_adds_up() -> None:
    torch.manual_seed(0)
    train_model = fxcollab.transform(Mlp().double(), "simple", ["first"], heads=3, seed=0)
    x, target = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % CLASSES
    expected = gradients(train_model, train_model, (x, target))
    train_model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        (fxcollab.CollaborativeLoss()(train_model(x[half]), target[half]) / 2).backward()
    assert_same_gradients({name: p.grad for name, p in train_model.named_parameters()}, expected)


def test_a_frozen_trunk_leaves_the_heads_gradients_alone() -> None:
    train_model = MODELS["skips"]().double()
    expected = gradients(train_model, train_model)
    train_model.conv1.requires_grad_(False)
    train_model.bn1.requires_grad_(False)
    train_model.layer1.requires_grad_(False)
    found = gradients(train_model, train_model)
    frozen = {name for name in expected if name.startswith(("conv1.", "bn1.", "layer1."))}
    assert_same_gradients(found, {name: g for name, g in expected.items() if name not in frozen})


@pytest.mark.parametrize("optimizer", slow_but([torch.optim.AdamW], [torch.optim.AdamW, torch.optim.SGD]))
def test_an_optimizer_resumes_from_its_state(optimizer: type[torch.optim.Optimizer]) -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            fxcollab.CollaborativeLoss()(model(batch()[0]), batch()[1]).backward()
            optimizer.step()

    whole, first, second = (MODELS["simple"]() for _ in range(3))
    steps(whole, optimizer(whole.parameters(), lr=0.01), 4)
    one = optimizer(first.parameters(), lr=0.01)
    steps(first, one, 2)
    other = optimizer(second.parameters(), lr=0.01)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(one.state_dict())
    steps(second, other, 2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


# ------------------------------------------------------------------------------------------- wrapped state dicts


@pytest.mark.parametrize("train_model", slow_but(["skips"], MODELS), indirect=True)
def test_wrapped_state_dicts_prune_to_the_plain_one(train_model: fxcollab.CollabGraphModule) -> None:
    state = train_model.state_dict()
    compiled = torch.compile(train_model, backend="eager")
    average = AveragedModel(train_model)
    wrapped = {
        "torch.compile": compiled.state_dict(),
        "AveragedModel": average.state_dict(),
        "AveragedModel of torch.compile": AveragedModel(compiled).state_dict(),
        "Lightning": {f"model.{name}": value for name, value in state.items()},
        "DDP of torch.compile in Lightning": {f"model.module._orig_mod.{name}": v for name, v in state.items()},
    }
    assert "n_averaged" in wrapped["AveragedModel"]
    heads = len(fxcollab.all_heads(train_model.eval())(batch()[0]))
    original = fxcollab.prune(train_model)
    for head in range(heads):
        plain = fxcollab.prune_state_dict(state, head)
        assert list(plain) == list(original.state_dict())
        for name, wrapping in wrapped.items():
            pruned = fxcollab.prune_state_dict(wrapping, head)
            assert list(pruned) == list(plain), name
            assert all(torch.equal(pruned[key], plain[key]) for key in plain), name
