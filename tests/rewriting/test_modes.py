"""Train and eval mode of a training model, its peers and the pruned one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxcollab
from tests.references import SmallConvNet
from tests.rewriting.state_helpers import CHAIN, assert_equal_states, chain, images, snapshot
from tests.speeds import slow_but


class FrozenStatistics(SmallConvNet):
    """The common recipe of fine-tuning: batch norm stays in eval mode, whatever is asked."""

    def train(self, mode: bool = True) -> FrozenStatistics:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def test_peers_follow_an_overridden_train() -> None:
    torch.manual_seed(0)
    train_model = fxcollab.transform(FrozenStatistics(), **CHAIN, seed=0)
    norms = [m for m in train_model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2 + 2 + 4
    for _ in range(2):
        assert train_model.train() is train_model and train_model.training
        assert not any(norm.training for norm in norms)
        assert train_model.peers.b1.layer2.training and train_model.peers.b0_1.fc.training
        train_model.eval()
        assert not any(module.training for module in train_model.modules())
    before = snapshot(train_model)
    train_model.train()(images())
    assert_equal_states(train_model.state_dict(), before)


def test_peers_keep_an_overridden_train_of_their_own() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    torch.manual_seed(0)
    model = SmallConvNet()
    model.layer3 = Frozen(*model.layer3)
    train_model = fxcollab.transform(model, **CHAIN, seed=0)
    train_model.train()
    assert not train_model.layer3.training and not train_model.peers.b1_1.layer3[1].training
    assert train_model.peers.b1.layer2[1].training


@pytest.mark.parametrize("training", slow_but([True], [True, False]))
def test_the_mode_of_the_model_is_kept(training: bool) -> None:
    model = SmallConvNet().train(training)
    train_model = fxcollab.transform(model, **CHAIN)
    assert {module.training for module in train_model.modules()} == {training}
    assert model.training is training
    assert fxcollab.prune(train_model).training is training


def test_transform_and_prune_leave_the_mode_of_every_module_alone() -> None:
    # BUG: both end with train(), which goes through the caller's modules.
    torch.manual_seed(0)
    model = SmallConvNet()
    model.bn1.eval(), model.layer2.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    train_model = fxcollab.transform(model, **CHAIN)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not train_model.peers.b1.layer2[1].training and train_model.peers.b1_0.layer3[1].training
    pruned = fxcollab.prune(train_model, 2)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not pruned.layer2[1].training and pruned.layer3[1].training


def test_statistics_are_private_to_a_branch() -> None:
    _, train_model = chain()
    with torch.no_grad():
        train_model(images())
    means = [
        train_model.get_buffer(f"{prefix}layer3.1.running_mean")
        for prefix in ("", "peers.b0_1.", "peers.b1_0.", "peers.b1_1.")
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(means) for b in means[:i])
    assert train_model.state_dict()["peers.b1_1.layer3.1.num_batches_tracked"] == 1
