"""A training model trains like any module: whoever compiles, casts, averages, checkpoints or distributes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fxcollab
from fxcollab.codegen.branches import Recompute
from samples.networks import densenet_cifar, resnet_cifar
from tests.processes import Jobs, Saved, saved_by
from tests.references import SkipNet, SmallConvNet

CLASSES = 5


class Mlp(nn.Module):
    """No BatchNorm, so that the mean over two half batches is the mean over the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_compiled_leftovers() -> Iterator[None]:
    yield
    torch.compiler.reset()


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images whose class can be told from their colours."""
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(10) % CLASSES
    colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    noise = torch.randn(10, 3, 8, 8, generator=generator)
    return (2 * colours[target] + 0.3 * noise).to(dtype), target


def train(
    model: Callable[..., Any],
    parameters: Any,
    steps: int = 8,
    data: tuple[Tensor, Tensor] | None = None,
    each: Callable[[], Any] = lambda: None,
) -> list[float]:
    """The losses of some steps."""
    x, target = data or batch()
    loss = fxcollab.CollaborativeLoss()
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = loss(model(x), target)
        total.backward()
        optimizer.step()
        each()
        losses.append(total.item())
    return losses


def gradients(
    model: Callable[..., Any], owner: nn.Module, data: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """The gradients of one step, under the parameters' names in ``owner``."""
    x, target = data or batch(next(owner.parameters()).dtype)
    owner.zero_grad()
    fxcollab.CollaborativeLoss()(model(x), target).backward()
    found = {name: p.grad.clone() for name, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    largest = max(float(g.abs().max()) for g in expected.values())
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12 * largest, msg=name)


# --------------------------------------------------------------------------------------------- in one process


def test_training_lowers_the_loss_and_moves_every_parameter(train_model: fxcollab.CollabGraphModule) -> None:
    before = {name: p.detach().clone() for name, p in train_model.named_parameters()}
    losses = train(train_model, train_model.parameters(), steps=12)
    assert losses[-1] < losses[0] - 0.3  # the soft term has a floor, the heads' own entropy
    still = [name for name, p in train_model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_every_head_learns(train_model: fxcollab.CollabGraphModule) -> None:
    x, target = batch()
    before = [F.cross_entropy(z, target).item() for z in train_model(x)]
    train(train_model, train_model.parameters(), steps=12)
    after = [F.cross_entropy(z, target).item() for z in train_model(x)]
    assert all(new < old for new, old in zip(after, before, strict=True))


def test_compiled_gradients_equal_eagers(train_model: fxcollab.CollabGraphModule) -> None:
    train_model.double()
    expected = gradients(train_model, train_model)
    compiled = torch.compile(train_model, fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(compiled, train_model), expected)


def test_compiled_training_lowers_the_loss_and_follows_the_mode() -> None:
    train_model, twin = MODELS["skips"](), MODELS["skips"]()
    compiled = torch.compile(train_model, fullgraph=True, backend="aot_eager")
    losses = train(compiled, compiled.parameters())
    assert_close(losses, train(twin, twin.parameters()), rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]
    compiled.eval(), twin.eval()
    with torch.no_grad():
        for output, expected in zip(compiled(batch()[0]), twin(batch()[0]), strict=True):
            assert_close(output, expected, rtol=1e-3, atol=1e-4)


def test_training_compiled_by_inductor() -> None:
    train_model, twin = _mlp(), _mlp()
    compiled = torch.compile(train_model, fullgraph=True)
    losses = train(compiled, compiled.parameters(), steps=4, data=_mlp_batch())
    assert_close(losses, train(twin, twin.parameters(), steps=4, data=_mlp_batch()))


def test_loss_and_model_compile_together() -> None:
    train_model = MODELS["simple"]().double()
    loss = fxcollab.CollaborativeLoss()
    x, target = batch(torch.float64)
    expected = gradients(train_model, train_model)
    step = torch.compile(lambda x, y: loss(train_model(x), y), fullgraph=True, backend="aot_eager")
    train_model.zero_grad()
    step(x, target).backward()
    assert_same_gradients({name: p.grad for name, p in train_model.named_parameters()}, expected)


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
    for head, output in enumerate(average(x)):
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


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
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
    heads = len(train_model.eval()(batch()[0]))
    original = fxcollab.prune(train_model)
    for head in range(heads):
        plain = fxcollab.prune_state_dict(state, head)
        assert list(plain) == list(original.state_dict())
        for name, wrapping in wrapped.items():
            pruned = fxcollab.prune_state_dict(wrapping, head)
            assert list(pruned) == list(plain), name
            assert all(torch.equal(pruned[key], plain[key]) for key in plain), name


# ---------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What the jobs below saved in the first of two processes, by name."""
    load = saved_by(JOBS, 2, tmp_path_factory.mktemp("two_processes"))
    return lambda name: load(name)[0]


def _mlp(recompute: Recompute | None = None) -> fxcollab.CollabGraphModule:
    torch.manual_seed(0)
    model = Mlp().double()
    return fxcollab.transform(model, splits=["first", "second"], fanouts=(2, 3), seed=1, recompute=recompute)


def _mlp_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 6, dtype=torch.float64, generator=generator), torch.arange(8) % CLASSES


def _half(rank: int) -> tuple[Tensor, Tensor]:
    x, target = _mlp_batch()
    return x[4 * rank : 4 * rank + 4], target[4 * rank : 4 * rank + 4]


WRAPPINGS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": DistributedDataParallel,
    "around compile": lambda model: DistributedDataParallel(
        torch.compile(model, fullgraph=True, backend="aot_eager")
    ),
    "inside compile": lambda model: torch.compile(DistributedDataParallel(model), backend="aot_eager"),
    "static graph": lambda model: DistributedDataParallel(model, static_graph=True),
}


RECOMPUTE: dict[str, Recompute | None] = {"kept": None, "again": "heads"}


def _train_under_ddp(rank: int) -> Saved:
    for name, how in product(WRAPPINGS, RECOMPUTE):
        wrap, model = WRAPPINGS[name], _mlp(RECOMPUTE[how])
        wrapped = wrap(model)
        x, target = _half(rank)
        fxcollab.CollaborativeLoss()(wrapped(x), target).backward()
        found = {key: p.grad for key, p in model.named_parameters()}
        torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
        yield f"{name} {how}", (found, wrapped.state_dict(), model.state_dict())


@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_ddp_gradients_equal_one_process_on_the_joined_batch(
    wrapping: str, how: str, results: Callable[[str], Any]
) -> None:
    twin = _mlp()
    found, _, _ = results(f"ddp/{wrapping} {how}")
    assert_same_gradients(found, gradients(twin, twin, _mlp_batch()))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_from_under_ddp_prune_to_what_the_original_loads(
    wrapping: str, results: Callable[[str], Any]
) -> None:
    _, wrapped_state, plain_state = results(f"ddp/{wrapping} kept")
    original = Mlp().double()
    assert list(wrapped_state) != list(plain_state)
    for head in range(6):
        pruned = fxcollab.prune_state_dict(wrapped_state, head)
        original.load_state_dict(pruned, strict=True)
        plain = fxcollab.prune_state_dict(plain_state, head)
        assert list(pruned) == list(plain) == list(original.state_dict())
        assert all(torch.equal(pruned[key], plain[key]) for key in plain)


class Tied(nn.Module):
    """Its first weight is its last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(self.embed(tokens))))


def _tied() -> fxcollab.CollabGraphModule:
    torch.manual_seed(0)
    return fxcollab.transform(Tied().double(), "simple", ["embed"], heads=3, seed=1)


def _tied_batch(samples: slice = slice(0, 8)) -> tuple[Tensor, Tensor]:
    return (torch.arange(8) * 3 % CLASSES)[samples], (torch.arange(8) % CLASSES)[samples]


def _train_tied_under_ddp(rank: int) -> Saved:
    model = _tied()
    wrapped = DistributedDataParallel(model)
    tokens, target = _tied_batch(slice(4 * rank, 4 * rank + 4))
    fxcollab.CollaborativeLoss()(wrapped(tokens), target).backward()
    yield "", {name: p.grad for name, p in model.named_parameters()}


def test_ddp_gradients_of_tied_weights(results: Callable[[str], Any]) -> None:
    twin = _tied()
    assert_same_gradients(results("tied"), gradients(twin, twin, _tied_batch()))


def _train_batch_norm_under_ddp(rank: int) -> Saved:
    torch.manual_seed(rank)  # of two processes that start apart, DDP takes the first one's weights
    model = fxcollab.transform(SkipNet, splits=["layer1", "layer2"], seed=rank)
    wrapped = DistributedDataParallel(model)
    x, target = batch()
    half = slice(5 * rank, 5 * rank + 5)
    losses = train(wrapped, wrapped.parameters(), steps=6, data=(x[half], target[half]))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    yield "", (losses, both, fxcollab.prune(wrapped, 3).state_dict())


def test_training_under_ddp_lowers_the_loss_and_keeps_processes_together(
    results: Callable[[str], Any],
) -> None:
    losses, weights, pruned = results("batch norm")
    assert losses[-1] < losses[0]
    assert torch.equal(*weights)
    SkipNet().load_state_dict(pruned, strict=True)


def _train_under_fsdp(rank: int) -> Saved:
    mesh = dist.init_device_mesh("cpu", (2,))
    for how, recompute in RECOMPUTE.items():
        yield how, _step_under_fsdp(rank, mesh, _mlp(recompute))


def _step_under_fsdp(rank: int, mesh: DeviceMesh, model: fxcollab.CollabGraphModule) -> Any:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    x, target = _half(rank)
    total = fxcollab.CollaborativeLoss()(model(x), target)
    total.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return total.detach(), found, whole


@pytest.mark.parametrize("how", RECOMPUTE)
def test_fsdp2_gradients_equal_one_process_on_the_joined_batch(how: str, results: Callable[[str], Any]) -> None:
    total, found, state = results(f"fsdp/{how}")
    assert total.isfinite()
    twin = _mlp()
    expected = gradients(twin, twin, _mlp_batch())
    assert_same_gradients(found, expected)
    original = Mlp().double()
    for head in range(6):
        original.load_state_dict(fxcollab.prune_state_dict(state, head), strict=True)
    for name, p in twin.named_parameters():
        assert_close(state[name], p.detach() - 0.1 * expected[name], rtol=1e-9, atol=1e-12, msg=name)


def _stages(recompute: Recompute | None = None) -> fxcollab.CollabGraphModule:
    torch.manual_seed(0)
    return fxcollab.transform(SmallConvNet().double(), splits=["layer1", "layer2"], seed=1, recompute=recompute)


def _stages_batch() -> tuple[Tensor, Tensor]:
    x, target = batch()
    return x.double(), target


def _recompute_under_fsdp(rank: int) -> Saved:
    """Stages with statistics, each sharded by itself; both processes see the whole batch."""
    model = _stages("heads")
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, target = _stages_batch()
    for _ in range(2):
        model.zero_grad()
        fxcollab.CollaborativeLoss()(model(x), target).backward()
    yield "", {name: p.grad.full_tensor() for name, p in model.named_parameters()} | dict(model.named_buffers())


def test_stages_with_statistics_are_computed_again_under_fsdp2(results: Callable[[str], Any]) -> None:
    plain = _stages()
    x, target = _stages_batch()
    for _ in range(2):
        plain.zero_grad()
        fxcollab.CollaborativeLoss()(plain(x), target).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()} | dict(plain.named_buffers())
    found = results("recompute under fsdp")
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


JOBS: Jobs = {
    "ddp": _train_under_ddp,
    "tied": _train_tied_under_ddp,
    "batch norm": _train_batch_norm_under_ddp,
    "fsdp": _train_under_fsdp,
    "recompute under fsdp": _recompute_under_fsdp,
}
