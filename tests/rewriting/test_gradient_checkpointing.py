"""Gradient checkpointing by the original's own methods: for all branches, with the same gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxcollab
from fxcollab import StateError
from tests.speeds import slow_but


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.conv(x)).relu())


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = False
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


class Net(nn.Module):
    """Has its method where libraries have it: on the root. It is the stages or the root that checkpoint."""

    def __init__(self, by_stages: bool) -> None:
        super().__init__()
        self.by_stages, self.checkpointing = by_stages, False
        self.stem, self.stages = nn.Conv2d(3, 4, 3), nn.ModuleList(Stage() for _ in range(3))
        self.head = nn.Linear(4, 5)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.stages if self.by_stages else [self]:
            module.checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = checkpoint(stage, x, use_reentrant=False) if self.checkpointing else stage(x)
        return self.head(x.mean((2, 3)))


def step(train_model: nn.Module, x: Any = None, kind: type = nn.Conv2d, call: Any = None) -> tuple[int, Any, Any]:
    """How often modules of a kind were called, the gradients, and the buffers after a step."""
    calls = [0]
    hooks = [
        module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        for module in train_model.modules()
        if isinstance(module, kind)
    ]
    train_model.zero_grad()
    torch.manual_seed(1)
    x = {"x": torch.randn(4, 3, 8, 8)} if x is None else x
    outputs = (train_model if call is None else call)(**x)
    outputs = [getattr(output, "logits", output) for output in outputs]
    torch.stack(outputs).square().sum().backward()
    for hook in hooks:
        hook.remove()
    gradients = [parameter.grad for parameter in train_model.parameters()]
    return calls[0], gradients, [buffer.clone() for buffer in train_model.buffers()]


def made(by_stages: bool, splits: Any, **options: Any) -> fxcollab.CollabGraphModule:
    torch.manual_seed(0)
    return fxcollab.transform(Net(by_stages), splits=splits, seed=0, **options)


def assert_same(found: Any, expected: Any) -> None:
    for values, others in zip(found[1:], expected[1:], strict=True):
        assert len(values) == len(others) and all(map(torch.equal, values, others))


STAGES = ["stages.0", "stages.1"]
INSIDE = ["stages.0.blocks.0", "stages.1"]
# Calls of convolutions: of the plain step, and again in the backward pass. The stem is a single layer.
CASES = {
    "the root checkpoints": (False, STAGES, 14),
    "stages checkpoint": (True, STAGES, 14),
    "an opened stage checkpoints": (True, INSIDE, 15),
    "the root checkpoints, a stage is opened": (False, INSIDE, 15),
}


@pytest.mark.parametrize("case", slow_but(["the root checkpoints", "an opened stage checkpoints"], CASES))
def test_what_is_switched_on_is_computed_again_in_every_branch(case: str) -> None:
    by_stages, splits, again = CASES[case]
    plain, train_model = made(by_stages, splits), made(by_stages, splits)
    train_model.set_grad_checkpointing()
    expected, found = step(plain), step(train_model)
    assert (expected[0], found[0] - expected[0]) == (again + 1, again)
    # A stage that checkpoints by itself updates its statistics twice, in the original as well.
    assert_same(found[:2] if by_stages else found, expected[:2] if by_stages else expected)
    train_model.set_grad_checkpointing(False)
    assert step(train_model)[0] == again + 1


@pytest.mark.parametrize("by_stages", [True, False])
def test_what_would_have_no_effect_is_refused(by_stages: bool) -> None:
    train_model = fxcollab.transform(Net(by_stages), "simple", ["stem"], seed=0, granularity="op")
    with pytest.raises(StateError, match="would have no effect") as caught:
        train_model.set_grad_checkpointing()
    assert "granularity='auto'" in str(caught.value.hint)
    train_model.set_grad_checkpointing(False)


def test_what_was_switched_on_before_the_transform_can_be_again() -> None:
    model = Net(by_stages=False)
    model.set_grad_checkpointing()
    with pytest.warns(UserWarning, match=r"not kept: switch it on in the training model.*set_grad_checkpointing"):
        train_model = fxcollab.transform(model, splits=STAGES, seed=0)
    assert step(train_model)[0] == 15
    train_model.set_grad_checkpointing()
    assert step(train_model)[0] == 29


def test_in_eval_mode_and_without_gradients_nothing_is_computed_again() -> None:
    train_model = made(False, STAGES)
    train_model.set_grad_checkpointing()
    train_model.eval()
    x = {"x": torch.randn(2, 3, 8, 8)}
    assert step(train_model, x, call=lambda x: [train_model(x)])[0] == 7
    train_model.train()
    with torch.no_grad():
        train_model(**x)
    assert "recompute" not in fxcollab.prune(train_model).code


COPIES = slow_but([copy.deepcopy], [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])


@pytest.mark.parametrize("copied", COPIES)
def test_copies_keep_it(copied: Any) -> None:
    train_model = made(False, STAGES)
    train_model.set_grad_checkpointing()
    found = step(copied(train_model))
    assert found[0] == 29
    assert_same(found, step(made(False, STAGES)))


def test_it_goes_together_with_recomputed_heads() -> None:
    train_model = made(False, STAGES, recompute="heads")
    train_model.set_grad_checkpointing()
    found = step(train_model)
    assert found[0] > 29
    assert_same(found, step(made(False, STAGES)))


@pytest.mark.slow
def test_it_compiles() -> None:
    train_model = made(False, STAGES)
    for module in train_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    plain = copy.deepcopy(train_model)
    train_model.set_grad_checkpointing()
    found = step(train_model, call=torch.compile(train_model, backend="aot_eager"))
    for value, expected in zip(found[1], step(plain)[1], strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "splits", "sizes", "kind"),
    [
        ("vit_tiny_patch16_224", ["blocks.0", "blocks.1"], {"depth": 3, "img_size": 32}, nn.Linear),
        ("resnet18", ["layer2"], {}, nn.Conv2d),
        ("convnext_atto", ["stages.1"], {}, nn.Conv2d),
    ],
)
def test_models_of_timm(name: str, splits: list[str], sizes: dict[str, int], kind: type) -> None:
    timm = pytest.importorskip("timm")
    x = {"x": torch.randn(2, 3, 32, 32)}
    plain = fxcollab.transform(
        timm.create_model(name, num_classes=5, **sizes), splits=splits, seed=0, example_inputs=x
    )
    train_model = copy.deepcopy(plain)
    train_model.set_grad_checkpointing()
    expected, found = step(plain, x, kind), step(train_model, x, kind)
    assert 1.8 * expected[0] < found[0] <= 2 * expected[0]
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "splits", [["bert.encoder.layer.0", "bert.encoder.layer.1"], "bert.encoder.layer.0.attention"]
)
def test_models_of_transformers(splits: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    ids = {"input_ids": torch.randint(0, 50, (2, 7))}
    model = transformers.BertForSequenceClassification(config)
    train_model = fxcollab.transform(model, splits=splits, seed=0, example_inputs=ids)
    expected = step(train_model, ids, nn.LayerNorm)
    train_model.activation_checkpointing_enable()
    found = step(train_model, ids, nn.LayerNorm)
    assert train_model.is_activation_checkpointing and found[0] == 2 * expected[0] - 1  # not the embeddings'
    assert_same(found, expected)
    train_model.activation_checkpointing_disable()
    assert step(train_model, ids, nn.LayerNorm)[0] == expected[0]
