"""Pruning: every head as a graph, into the original, and from a checkpoint alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fxcollab
from fxcollab.errors import PatternError, StateError
from tests.references import SkipNet, SmallConvNet
from tests.rewriting.state_helpers import Mlp, assert_equal_states, chain, images, mlp, one_step, snapshot


@pytest.mark.parametrize("make", [mlp, chain])
def test_every_head_prunes_in_three_forms_to_the_same(make: Callable[[], Any]) -> None:
    model, train_model = make()
    x = images() if make is chain else torch.randn(4, 4)
    one_step(train_model, x)
    outputs = fxcollab.all_heads(train_model.eval())(x)
    state = snapshot(train_model)
    for head, expected in enumerate(outputs):
        pruned = fxcollab.prune(train_model, head)
        assert torch.equal(pruned(x), expected) and not pruned.training
        by_state = type(model)().eval()
        by_state.load_state_dict(fxcollab.prune_state_dict(state, head), strict=True)
        into = type(model)().eval()
        assert fxcollab.prune(train_model, head, into=into) is into
        for other in (by_state, into):
            assert torch.equal(other(x), expected)
            assert_equal_states(other.state_dict(), pruned.state_dict())
    assert_equal_states(train_model.state_dict(), state)


def test_pruned_heads_hold_the_training_models_own_tensors() -> None:
    _, train_model = chain()
    trained = train_model.state_dict(keep_vars=True)
    for head, path in enumerate(["b0_0", "b0_1", "b1_0", "b1_1"]):
        pruned = fxcollab.prune(train_model, head).state_dict(keep_vars=True)
        middle = "layer2.0.weight" if head < 2 else "peers.b1.layer2.0.weight"
        last = "fc.weight" if head == 0 else f"peers.{path}.fc.weight"
        assert pruned["conv1.weight"] is trained["conv1.weight"]
        assert pruned["layer2.0.weight"] is trained[middle]
        assert pruned["fc.weight"] is trained[last]


def test_pruning_a_head_into_the_original_puts_its_weights_there() -> None:
    model, train_model = chain()
    x = images()
    expected = fxcollab.all_heads(train_model.eval())(x)[3]
    assert fxcollab.prune(train_model, 3, into=model) is model
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("wrong", [lambda: SmallConvNet(num_classes=6), lambda: SkipNet(), lambda: nn.Linear(2, 2)])
def test_a_model_that_does_not_fit_is_refused_and_left_as_it_was(wrong: Callable[[], nn.Module]) -> None:
    _, train_model = chain()
    into = wrong()
    before = snapshot(into)
    with pytest.raises(StateError, match="nothing was written"):
        fxcollab.prune(train_model, 1, into=into)
    assert_equal_states(into.state_dict(), before)


@pytest.mark.parametrize("head", [-1, 4, 99])
def test_heads_that_are_not_there_are_refused(head: int) -> None:
    model, train_model = chain()
    for prune in (
        lambda: fxcollab.prune(train_model, head),
        lambda: fxcollab.prune(train_model, head, into=model),
        lambda: fxcollab.prune_state_dict(train_model.state_dict(), head),
    ):
        with pytest.raises(PatternError, match=rf"no head {head}[\s\S]*0 to 3"):
            prune()


def without_bias(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Linear(4, 4, bias=False))


def without_anything(module: nn.Module, name: str) -> None:
    setattr(module, name, None)


def identity(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Identity())


def deleted(module: nn.Module, name: str) -> None:
    del module._modules[name]


@pytest.mark.parametrize("edit", [without_bias, without_anything, identity, deleted])
@pytest.mark.parametrize("heads", [2, 4])
def test_a_branch_that_was_edited_by_hand_gets_nothing_of_another_head(
    heads: int, edit: Callable[[nn.Module, str], None]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    fanouts = {2: ((2,), ["0"]), 4: ((2, 2), ["0", "1"])}[heads]
    train_model = fxcollab.transform(model, splits=fanouts[1], fanouts=fanouts[0], init="copy-anyway")
    branch = "b1" if heads == 2 else "b1_0"
    edit(train_model.get_submodule(f"peers.{branch}"), "2")
    head, state = heads // 2, train_model.state_dict()
    with pytest.raises(StateError, match=r"lacks (peers\.b1|branches)"):
        fxcollab.prune_state_dict(state, head)
    with pytest.raises(StateError, match=r"don't fit|has no"):
        fxcollab.prune(train_model, head, into=copy.deepcopy(model))
    if edit in (without_anything, deleted):
        with pytest.raises(StateError, match="has no"):
            fxcollab.prune(train_model, head)
    else:
        pruned = fxcollab.prune(train_model, head)
        assert pruned.get_submodule("2") is not model[2] and "2.bias" not in pruned.state_dict()


@pytest.mark.parametrize(("head", "target", "other"), [(1, "peers.b1.2", "2"), (0, "2", "peers.b1.2")])
def test_a_node_that_an_edit_made_call_another_heads_module_is_refused(head: int, target: str, other: str) -> None:
    train_model = fxcollab.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), splits=["0"])
    [node] = [node for node in train_model.graph.nodes if node.target == target]
    node.target = other
    train_model.recompile()
    with pytest.raises(StateError, match="belongs to another"):
        fxcollab.prune(train_model, head)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(("head", "gone"), [(0, "2"), (1, "peers.b1.2"), (1, "peers.b1"), (1, "0"), (1, "peers")])
def test_what_another_heads_weights_would_replace_is_missed(head: int, gone: str, into: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    train_model = fxcollab.transform(model, splits=["1"], init="copy-anyway")
    parent, _, name = gone.rpartition(".")
    del train_model.get_submodule(parent)._modules[name]
    with pytest.raises(StateError, match="has no"):
        fxcollab.prune(train_model, head, into=copy.deepcopy(model)) if into else fxcollab.prune(train_model, head)
    if head == 1 and gone != "0":  # which is not head 0's
        assert torch.equal(fxcollab.prune(train_model).get_parameter("2.weight"), model[2].weight)


def test_a_pruned_model_is_no_training_model() -> None:
    _, train_model = chain()
    for other in (fxcollab.prune(train_model), nn.Linear(2, 2)):
        with pytest.raises(StateError, match="not a training model"):
            fxcollab.prune(other)


def test_prune_state_dict_names_what_is_wrong_with_a_checkpoint() -> None:
    model, train_model = chain()
    state = train_model.state_dict()
    with pytest.raises(StateError, match=r"holds no peers[\s\S]*conv1.weight"):
        fxcollab.prune_state_dict(model.state_dict())
    with pytest.raises(StateError, match=r"checkpoint\['model'\]"):
        fxcollab.prune_state_dict({"epoch": 3, "model": state})
    with pytest.raises(StateError, match="not a state dict"):
        fxcollab.prune_state_dict({0: torch.ones(1)})
    with pytest.raises(StateError, match="holds no peers"):
        fxcollab.prune_state_dict({})
    for branch, message in (("b1_0", "lacks branches"), ("b1", "lacks the peers of b1")):
        half = {name: value for name, value in state.items() if not name.startswith(f"peers.{branch}.")}
        with pytest.raises(StateError, match=message):
            fxcollab.prune_state_dict(half)


def test_prefixes_are_told_from_the_originals_own_names() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = Outer()
    train_model = fxcollab.transform(model, "simple", ["module.first"], seed=0)
    for prefix in ("", "module.", "model.", "_orig_mod.module.", "module._orig_mod."):
        wrapped = {prefix + name: value for name, value in train_model.state_dict().items()}
        for head in (0, 1):
            assert list(fxcollab.prune_state_dict(wrapped, head)) == list(model.state_dict())


@pytest.mark.slow
def test_heads_prune_back_into_a_model_with_compiled_parts() -> None:
    # BUG: the names of the compiled parts lose their "_orig_mod." like those of a wrapper, so nothing fits.
    _, model = torch.manual_seed(0), SmallConvNet()
    model.layer1 = torch.compile(model.layer1, backend="eager")
    model.layer3 = torch.compile(model.layer3, backend="eager")
    train_model = fxcollab.transform(model, "simple", ["layer1"], seed=0).eval()
    expected = fxcollab.all_heads(train_model)(images())[1]
    assert torch.equal(fxcollab.prune(train_model, 1)(images()), expected)
    assert torch.equal(fxcollab.prune(train_model, 1, into=model)(images()), expected)


@pytest.mark.parametrize("head", [0, 3])
def test_a_pruned_model_exports(head: int) -> None:
    _, train_model = chain()
    pruned = fxcollab.prune(train_model.eval(), head)
    exported = torch.export.export(pruned, (images(),))
    assert exported.state_dict.keys() == SmallConvNet().state_dict().keys()
    assert torch.equal(exported.module()(images()), pruned(images()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_a_pruned_model_scripts() -> None:
    # As in plain fx, annotations must be types: TorchScript can't read the texts of ``from __future__``.
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    train_model = fxcollab.transform(nn.Sequential(*layers), splits="2", seed=0)
    for head in (0, 1):
        pruned = fxcollab.prune(train_model.eval(), head)
        assert torch.equal(torch.jit.script(pruned)(images()), pruned(images()))


def test_a_pruned_model_follows_what_is_assigned_and_what_hooks_fill() -> None:
    class Averages(SmallConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            self.average = 0.9 * self.average + z.detach().mean()
            return z + self.average

    torch.manual_seed(0)
    model, seen = Averages(), {}
    model.layer3.register_forward_hook(lambda module, args, output: seen.update(layer3=output))
    train_model = fxcollab.transform(model, splits="layer1", seed=0)
    pruned = fxcollab.prune(train_model).eval()
    for _ in range(3):
        train_model(images())
    assert torch.equal(pruned.average, model.average) and float(pruned.average) != 0
    seen.clear()
    pruned(images())
    assert "layer3" in seen


def test_an_average_beside_the_model_is_not_taken_for_a_part_of_it() -> None:
    state = chain()[1].state_dict()
    with pytest.raises(StateError, match="several training models"):
        fxcollab.prune_state_dict({**state, **{f"ema.{key}": value for key, value in state.items()}})


class Centred(nn.Module):
    """Keeps a running mean in a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("centre", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stem(x)).repeat(1, 2)
        if self.training:
            self.centre.lerp_(x.detach().mean(0), 0.1)
        return x - self.centre


@pytest.mark.parametrize("head", [0, 1])
def test_a_head_loaded_into_a_model_brings_its_buffers_that_no_state_dict_has(head: int) -> None:
    torch.manual_seed(0)
    model, x = Centred(), torch.randn(8, 4)
    train_model = fxcollab.transform(model, splits=["stem"], seed=0, example_inputs=(x,))
    for _ in range(3):
        train_model.train()(x)
    expected = fxcollab.all_heads(train_model.eval())(x)[head]
    for into in (Centred(), model):
        assert torch.equal(fxcollab.prune(train_model, head, into=into).eval()(x), expected)


class Growing(Centred):
    """Keeps what it has seen, as caches of masks and of positions do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            self.centre = torch.cat([self.centre, x.detach().mean(0, keepdim=True)])
        return x - self.centre.sum(0)


@pytest.mark.parametrize("head", [0, 1])
def test_buffers_that_have_grown_are_brought_as_they_are(head: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Growing()), torch.randn(8, 4)
    model[1].centre = torch.zeros(1, 4)
    other = copy.deepcopy(model)
    train_model = fxcollab.transform(model, splits=["0"], seed=0, example_inputs=(x,))
    train_model.train()(x)
    expected = fxcollab.all_heads(train_model.eval())(x)[head]
    assert torch.equal(fxcollab.prune(train_model, head, into=other).eval()(x), expected)
    assert other[1].centre.shape == (2, 4)


class Counting(nn.Module):
    """Has a parameter with the name of what `AveragedModel` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.last = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)
        self.n_averaged = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.module(x)) * self.n_averaged


@pytest.mark.parametrize("make", [lambda: AveragedModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))), Counting])
def test_what_wrappers_call_their_own_is_the_models_where_it_is_the_model(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make()
    train_model = fxcollab.transform(model, splits=["module.0"], seed=0, example_inputs=(torch.zeros(1, 4),))
    for head in (0, 1):
        state = fxcollab.prune_state_dict(train_model.state_dict(), head)
        assert list(state) == list(model.state_dict())
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run", copy.deepcopy(model))
    assert_equal_states(loaded.state_dict(), train_model.state_dict())
    averaged = AveragedModel(train_model).state_dict()
    assert_equal_states(
        fxcollab.prune_state_dict(averaged, 1), fxcollab.prune_state_dict(train_model.state_dict(), 1)
    )
