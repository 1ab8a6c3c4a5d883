"""Graphs of train and eval mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CollabGraphModule
from fxcollab.fx_utils import first_difference
from tests.tracing.capture_helpers import AuxNet, Net, X, follows_the_mode, names, run


def test_a_forward_that_reads_training_follows_train_and_eval() -> None:
    model = AuxNet()
    captured = fxcollab.capture(model, ["stem"])
    assert captured.modes.differ
    assert follows_the_mode(captured, model)


def test_a_forward_that_doesnt_is_held_once() -> None:
    captured = fxcollab.capture(Net(), ["stem"])
    assert captured.modes.train is captured.modes.eval
    assert "self.training" not in captured.code


@pytest.mark.parametrize("training", [True, False])
def test_capture_starts_in_the_models_mode_and_leaves_it(training: bool) -> None:
    model = AuxNet().train(training)
    captured = fxcollab.capture(model, ["stem"])
    assert captured.training is model.training is training
    assert captured.graph is captured.modes.of(training)


def test_code_shows_both_modes_and_graph_is_that_of_the_present() -> None:
    captured = fxcollab.capture(AuxNet(), ["stem"])
    assert captured.code.count("def forward") == 1
    train_body, eval_body = captured.code.split("    else:")
    assert "if self.training:" in train_body
    assert "self.aux(" in train_body and "self.aux(" not in eval_body
    assert "aux" in names(captured.train().graph)
    assert "aux" not in names(captured.eval().graph)


def test_the_flag_decides_even_where_train_was_not_called() -> None:
    captured = fxcollab.capture(AuxNet(), ["stem"])
    captured.training = False
    assert isinstance(run(captured), Tensor)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_follow_the_mode(clone: Callable[[nn.Module], CollabGraphModule], training: bool) -> None:
    model = AuxNet()
    captured = fxcollab.capture(model, ["stem"]).train(training)
    new = clone(captured)
    assert new.training is training
    assert new.code == captured.code
    assert first_difference(new.graph, captured.graph) is None
    assert follows_the_mode(new, model)
    assert new.stem is not captured.stem
    new.eval()
    captured.train()
    assert new.training is False


@pytest.mark.parametrize("training", [True, False])
def test_the_training_model_and_the_pruned_one_follow_the_mode(training: bool) -> None:
    model = AuxNet().train(training)
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    assert train_model.training is training
    outputs = run(train_model.train())
    assert [len(head) for head in outputs] == [2, 2]
    outputs = run(train_model.eval())
    assert all(isinstance(head, Tensor) for head in outputs)
    assert follows_the_mode(fxcollab.prune(train_model), model)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_compiled_two_mode_module_follows_the_mode() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x * 2 if self.training else x.sin())

    model = Modes()
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    compiled = torch.compile(train_model, fullgraph=True, backend="eager")
    for training in (True, False, True):
        train_model.train(training)
        assert torch.equal(fxcollab.all_heads(compiled)(X)[0], model.train(training)(X))
    torch._dynamo.reset()


def test_what_one_mode_sets_is_not_seen_by_the_other() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if self.training:
                self.last = x
            elif self.last is not None:
                x = x + self.last
            return self.head(x)

    captured = fxcollab.capture(Cache(), ["stem"])
    assert names(captured.modes.eval) == ["x", "stem", "head", "output"]
