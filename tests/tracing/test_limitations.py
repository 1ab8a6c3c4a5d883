"""What a capture can't keep is said: in a warning, in the summary and in the report."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxcollab
from fxcollab import CaptureError
from tests.speeds import slow_but

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


def limitations(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxcollab.transform(model, splits=["b"], pattern="simple")
    return [str(w.message) for w in caught if str(w.message).startswith("limitation")]


class Counts(Net):
    step = 0

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.step += 1
        h = self.b(self.a(x))
        return self.d(self.c(h * 0.5 if self.step < 10 else h))


class KeepsTheLast(Net):
    def forward(self, x: Tensor) -> Any:
        self.last = self.b(self.a(x))
        return self.d(self.c(self.last))


@pytest.mark.parametrize(("make", "name"), [(Counts, "step"), (KeepsTheLast, "last")])
def test_what_an_opened_forward_assigns_is_listed(make: type[Net], name: str) -> None:
    model = make()
    [sentence] = limitations(model)
    assert f"assigns to {name} is not kept" in sentence
    assert name not in vars(model)


def test_a_plain_forward_gives_up_nothing() -> None:
    assert limitations(Net()) == []


class Checkpoints(Net):
    reentrant = True

    def forward(self, x: Tensor) -> Any:
        h = checkpoint(self.a, x, use_reentrant=self.reentrant)
        return self.d(self.c(checkpoint(self.b, h, use_reentrant=self.reentrant)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_an_opened_forward_keeps_its_gradients(reentrant: bool) -> None:
    model = Checkpoints()
    model.reentrant = reentrant
    with pytest.warns(UserWarning, match="checkpointing in an opened forward is not kept"):
        train_model = fxcollab.transform(model, splits=["b"], pattern="simple")
    assert torch.utils.checkpoint.checkpoint is checkpoint
    train_model(X.clone().requires_grad_())[0].sum().backward()
    assert model.a.weight.grad is not None
    assert model.a.weight.grad.abs().sum() > 0


class CheckpointedBlock(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Linear(8, 8), reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda z: torch.tanh(self.inner(z)), x, use_reentrant=self.reentrant)


class CheckpointedTwice(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.m, self.d = CheckpointedBlock(reentrant), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.d(self.a(self.m(self.a(x))))


@pytest.mark.parametrize("reentrant", [True, False])
def test_verify_tells_whether_checkpointed_state_on_both_sides_of_a_split_is_rescaled(reentrant: bool) -> None:
    # Reentrant checkpointing computes again with the module's own parameter, not the one it was fed: a known limit.
    model = CheckpointedTwice(reentrant)
    train_model = fxcollab.transform(model, splits=["m"], pattern="simple")
    failed = [check for check in fxcollab.verify(model, train_model, (X,)) if not check.ok]
    assert len(failed) == int(reentrant)
    assert all("largest relative difference" in check.detail and "a.inner" in check.detail for check in failed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_a_module_kept_whole_is_proved(reentrant: bool) -> None:
    blocks = [CheckpointedBlock(reentrant), CheckpointedBlock(reentrant)]
    model = nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 4))
    train_model = fxcollab.transform(model, splits=["1"], pattern="simple")
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


class OrderedOutput(Net):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(out=super().forward(x))


@dataclass
class Fields:
    logits: Tensor


class DataclassOutput(Net):
    def forward(self, x: Tensor) -> Any:
        return Fields(super().forward(x))


@pytest.mark.parametrize(("make", "kind"), [(OrderedOutput, OrderedDict), (DataclassOutput, Fields)])
def test_outputs_keep_their_own_type(make: type[Net], kind: type) -> None:
    model = make()
    train_model = fxcollab.transform(model, splits=["b"], pattern="simple")
    assert [type(output) for output in train_model(X)] == [kind, kind]
    assert type(fxcollab.prune(train_model)(X)) is kind
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_a_model_without_required_inputs_needs_examples() -> None:
    class Optional(Net):
        def forward(self, x: Tensor | None = None) -> Any:
            return super().forward(X if x is None else x)

    with pytest.raises(fxcollab.CaptureError, match="has no required input") as caught:
        fxcollab.transform(Optional(), splits=["b"])
    assert "example_inputs" in str(caught.value.hint)
    train_model = fxcollab.transform(model := Optional(), splits=["b"], pattern="simple", example_inputs={"x": X})
    fxcollab.verify(model, train_model, {"x": X}).raise_if_failed()


def test_a_main_input_that_a_model_declares_is_its_input_all_the_same() -> None:
    class Declares(Net):
        main_input_name = "values"

        def forward(self, mask: Tensor | None = None, values: Tensor | None = None) -> Any:
            assert values is not None
            return super().forward(values if mask is None else values * mask)

    with pytest.warns(UserWarning, match="optional inputs mask are fixed"):
        train_model = fxcollab.transform(model := Declares(), splits=["b"], pattern="simple")
    assert [node.target for node in train_model.graph.find_nodes(op="placeholder")] == ["values"]
    fxcollab.verify(model, train_model, {"values": X}).raise_if_failed()


class Options(Net):
    def forward(self, x: Tensor, scale: float = 2.0, *, mask: Tensor | None = None) -> Any:
        a = self.a(x)
        a = a if mask is None else a * mask
        return self.d(self.c(self.b(a) * scale))


def test_inputs_behind_a_gap_and_keyword_only_ones_are_proved_by_name() -> None:
    model, examples = Options(), {"x": X, "mask": torch.rand(4, 8)}
    train_model = fxcollab.transform(model, splits=["b"], pattern="simple", example_inputs=examples)
    fxcollab.verify(model, train_model, examples).raise_if_failed()
    fxcollab.verify(model, train_model).raise_if_failed()


def test_a_scalar_example_is_known() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, k: Tensor) -> Any:
            return super().forward(x) * k

    model = Scaled()
    train_model = fxcollab.transform(model, splits=["b"], pattern="simple", example_inputs=(X, torch.tensor(2.0)))
    fxcollab.verify(model, train_model).raise_if_failed()


def test_transforms_in_several_threads_leave_torch_as_it_is() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(2):
                fxcollab.transform(Net(), splits=["b"], seed=0)
                with torch.autocast("cpu"):
                    pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with torch.autocast("cpu"):
        pass


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.c = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        nn.init.normal_(self.c.weight, 0, 100.0)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.bn(self.a(x)))


def test_a_child_that_was_replaced_follows_modes_and_is_pruned() -> None:
    train_model = fxcollab.transform(WithBatchNorm(), splits=["bn"], pattern="simple")
    train_model = nn.SyncBatchNorm.convert_sync_batchnorm(train_model)
    train_model.eval()
    assert not any(module.training for module in train_model.modules())
    pruned = fxcollab.prune(train_model)
    assert type(pruned.bn) is nn.SyncBatchNorm and pruned.bn.running_mean is train_model.bn.running_mean


def test_verify_finds_that_the_original_is_no_longer_the_one_trained() -> None:
    model = Net()
    train_model = fxcollab.transform(model, splits=["b"], pattern="simple")
    train_model.d = nn.Linear(8, 4)
    assert torch.equal(fxcollab.prune(train_model)(X), train_model(X)[0])
    assert not fxcollab.verify(model, train_model, (X,))


def test_a_constant_branch_doesnt_cost_the_others_their_factorys_initialisation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="only .* lie between 'a' and 'bn'")
        train_model = fxcollab.transform(WithBatchNorm, splits=["a", "bn"], seed=1)
    assert train_model.peers.b0_1.c.weight.std() > 50


def test_a_module_under_two_names_is_proved() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.q = nn.Linear(8, 8), nn.Linear(8, 8)
            self.q2 = self.q

        def forward(self, x: Tensor) -> Any:
            return self.q2(self.q(self.a(x)))

    model = Twice()
    train_model = fxcollab.transform(model, splits=["a"], pattern="simple")
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_a_node_of_another_pass_fails_the_proof() -> None:
    model = Net()
    train_model = fxcollab.transform(model, splits=["b"], pattern="simple")
    node = next(iter(train_model.graph.find_nodes(op="call_module")))
    with train_model.graph.inserting_after(node):
        train_model.graph.call_function(torch.neg, (node,))
    train_model.recompile()
    report = fxcollab.verify(model, train_model, (X,))
    failed = [check.name for check in report if not check.ok]
    assert failed[:2] == ["graph of head 0 equals the original's", "graph of head 1 equals the original's"]


@pytest.mark.parametrize("wrap", ["model", "module"])
def test_a_checkpoint_of_a_training_module_with_other_state_is_pruned(wrap: str) -> None:
    model = Net()
    train_model = fxcollab.transform(model, splits=["b"], pattern="simple")
    wrapper = nn.Module()
    wrapper.add_module(wrap, train_model)
    wrapper.criterion = nn.CrossEntropyLoss(weight=torch.ones(4))
    Net().load_state_dict(fxcollab.prune_state_dict(wrapper.state_dict(), head=1), strict=True)
    assert list(fxcollab.prune(wrapper).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", ["", "a.b", "class"])
def test_the_name_of_the_peers_must_be_a_name(name: str) -> None:
    with pytest.raises(fxcollab.StateError, match="can't be the name of the peers"):
        fxcollab.transform(Net(), splits=["b"], peers=name)


def test_a_forward_replaced_on_an_instance_may_write_into_its_input() -> None:
    class Patched(Net):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.act.forward = lambda input: input.clamp_(min=0)  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Any:
            return self.d(self.act(self.b(self.a(x))))

    model = Patched()
    train_model = fxcollab.transform(model, splits=["b"], heads=3, pattern="simple")
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_a_split_of_one_mode_is_said_to_be_one() -> None:
    class InTraining(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return self.d(self.c(self.b(x) if self.training else x))

    with pytest.raises(fxcollab.SplitError, match="Split 'b' exists in train mode only"):
        fxcollab.transform(InTraining(), splits=["b"])


def test_a_forward_that_exits_is_refused_like_any_other_that_fails() -> None:
    class Exits(Net):
        def forward(self, x: Tensor) -> Any:
            raise SystemExit(0)

    with pytest.raises(fxcollab.CaptureError, match="can't be captured"):
        fxcollab.transform(Exits(), splits=["b"])


def test_dense_labels_of_bytes_are_labels() -> None:
    logits, labels = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)], torch.randint(0, 3, (2, 4, 4))
    loss = fxcollab.CollaborativeLoss()
    assert torch.equal(loss(logits, labels.to(torch.uint8)), loss(logits, labels))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x).relu() + x


class Blocks(nn.Module):
    def __init__(self, change: Callable[[nn.Module], Any] = lambda block: None) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = Block(), Block(), Block(), nn.Linear(8, 4)
        changed = change(self.b)
        if isinstance(changed, nn.Module):
            self.b = changed

    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(self.b(self.a(x))))


def notes_of(model: nn.Module, split: str, granularity: Any = "auto") -> tuple[str, ...]:
    """What is given up by a training model that is proved."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "limitation")
        train_model = fxcollab.transform(model, "simple", [split], granularity=granularity, example_inputs=(X,))
    report = fxcollab.verify(model, train_model, (X,))
    report.raise_if_failed()
    return report.limitations


@pytest.mark.parametrize(
    ("split", "granularity"), [pytest.param("b.linear", "auto", marks=pytest.mark.slow), ("a", "op")]
)
def test_hooks_of_opened_modules_are_listed_however_they_were_opened(split: str, granularity: str) -> None:
    backward = Blocks(lambda block: block.register_full_backward_hook(lambda *_: None))
    assert any("backward hooks of b don't run" in note for note in notes_of(backward, split, granularity))
    seen: list[Any] = []
    forward = Blocks(lambda block: block.register_forward_hook(lambda _, __, output: seen.append(type(output))))
    assert any("forward hooks of b ran once" in note for note in notes_of(forward, split, granularity))
    assert notes_of(backward, "a") == notes_of(forward, "a") == ()


def test_hooks_of_torch_that_only_compute_are_not_listed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = Blocks(lambda block: nn.utils.weight_norm(block.linear))
    assert notes_of(model, "a", "op") == ()


COMPILERS: dict[str, Callable[[nn.Module], Any]] = {
    "compile in place": lambda block: block.compile(backend="eager"),
    "compile": lambda block: torch.compile(block, backend="eager"),
    "script": torch.jit.script,
}


@pytest.mark.parametrize("compiler", slow_but(["compile in place"], COMPILERS))
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_module_is_kept_whole_at_any_granularity(compiler: str) -> None:
    model = Blocks(COMPILERS[compiler])
    assert notes_of(model, "a", "op") == notes_of(model, "a") == ()
    inside = "b._orig_mod.linear" if compiler == "compile" else "b.linear"
    with pytest.raises(CaptureError, match="can only be a leaf module") as caught:
        fxcollab.transform(model, "simple", [inside], example_inputs=(X,))
    assert "that works is 'b'" in str(caught.value.hint)
