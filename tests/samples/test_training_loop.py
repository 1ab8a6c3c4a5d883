"""The samples' data, noise, steps and loop, on scikit-learn's digits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fxcollab
from samples.networks.resnet_cifar import resnet_cifar
from samples.networks.small import ConvNet
from samples.paper import methods
from samples.paper.experiments import EXPERIMENTS
from samples.paper.networks import NETWORKS
from samples.training import lines, prepared
from samples.training.data import data_set
from samples.training.evaluate import errors
from samples.training.in_memory import FASHION_MNIST, digits, fashion_mnist
from samples.training.noise import with_noise
from samples.training.prepared import breast_cancer
from samples.training.recipe import Recipe
from samples.training.steps import simultaneous
from samples.training.trainer import Kept, Training, epochs
from tests.speeds import slow_but

RECIPE = Recipe(3, batch=128)
RESNET = NETWORKS["ResNet-8, grey"]
build = partial(resnet_cifar, 8, in_maps=1)


def started(method: methods.Method, **options: Any) -> Training:
    return methods.training(method, RESNET, build, RECIPE, seed=1, **options)


# --- Data and noise ---


def test_noise_corrupts_the_same_samples_and_draws_their_labels_anew() -> None:
    labels = torch.arange(1000) % 10
    once, again = (with_noise(labels, 0.4, 10, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    wrong, also_wrong = once != labels, again != labels
    assert 0.3 < wrong.float().mean() < 0.4  # one in ten of those drawn is right
    assert (once != again).sum() > 300
    assert (wrong | also_wrong).sum() <= 400
    assert torch.equal(with_noise(labels, 0.0, 10, torch.Generator()), labels)
    drawn = with_noise(torch.zeros(10_000, dtype=torch.long), 1.0, 10, torch.Generator().manual_seed(0))
    assert all(900 < count < 1100 for count in drawn.bincount(minlength=10)), "uniform over all classes"


def test_the_rate_falls_by_ten_at_half_and_three_quarters() -> None:
    rates = [Recipe(20).rate(epoch) for epoch in range(20)]
    assert rates[:10] == [0.1] * 10
    assert rates[10:15] == pytest.approx([0.01] * 5)
    assert rates[15:] == pytest.approx([0.001] * 5)


@pytest.mark.slow
def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    data = replace(digits(), noise=0.2, flip=True)
    first, same, other, next_one = (
        [torch.cat(parts) for parts in zip(*data.train(epoch, seed, 64), strict=True)]
        for epoch, seed in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[1], same[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], next_one[0])
    assert len(first[0]) == 64 * data.steps(64)


def test_images_are_normalised_by_the_training_set() -> None:
    data = replace(digits(), shift=0)
    images = torch.cat([images for images, _ in data.train(0, 0, 1_497)])
    assert images.mean().abs() < 1e-4
    assert (images.std() - 1).abs() < 1e-3


def test_grey_images_are_shown_to_networks_of_three_channels() -> None:
    assert next(iter(data_set("digits", Path(), rgb=True).test(2)))[0].shape == (2, 3, 8, 8)


def test_images_are_resized() -> None:
    assert next(iter(data_set("digits", Path(), size=20).test(2)))[0].shape == (2, 1, 20, 20)


def test_noise_is_for_training_labels_alone() -> None:
    clean, noisy = digits(), replace(digits(), noise=0.8)
    for (_, expected), (_, found) in zip(clean.test(100), noisy.test(100), strict=True):
        assert torch.equal(found, expected)


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no data set 'mnits'"):
        data_set("mnits", Path())


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_read_from_the_files_of_its_authors() -> None:
    data = fashion_mnist()
    assert data.images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert torch.equal(data.labels.bincount(), torch.full((10,), 6_000))
    assert (data.images.float().mean() - 72.94).abs() < 0.01


def test_image_folders_are_trained_on(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for kind in ("a", "b"):
            (tmp_path / part / kind).mkdir(parents=True)
            Image.new("L", (40, 30)).save(tmp_path / part / kind / "0.png")
    data = data_set("folder", tmp_path)
    images, labels = next(iter(replace(data, workers=0).train(0, 0, 2)))
    assert images.shape == (2, 3, 224, 224)
    assert sorted(labels.tolist()) == [0, 1]


# --- Steps and the loop ---


def test_alternating_updates_are_those_of_two_networks_by_hand() -> None:
    training = started(methods.ALTERNATING)
    first, second = build(), build()
    first.load_state_dict(fxcollab.prune_state_dict(training.modules[0].state_dict(), 0))
    second.load_state_dict(fxcollab.prune_state_dict(training.modules[0].state_dict(), 1))
    networks = first, second
    optimizers = [RECIPE.optimizer(network.parameters()) for network in networks]
    for images, labels in list(digits().train(0, 0, 128))[:3]:
        training.step(images, labels)
        said, peers = first(images), second(images)
        for own, network, optimizer in zip((said, peers), networks, optimizers, strict=True):
            other = peers if network is first else first(images)  # which has moved
            hard = nn.functional.cross_entropy(own, labels)
            soft = nn.functional.cross_entropy(own, other.detach().softmax(1))
            optimizer.zero_grad()
            (0.5 * hard + 0.5 * soft).backward()
            optimizer.step()
    for head, network in enumerate(networks):
        pruned = fxcollab.prune_state_dict(training.modules[0].state_dict(), head)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(pruned[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_methods_start_from_the_weights_of_the_single_instance() -> None:
    single = started(methods.SINGLE).modules[0].state_dict()
    for method in (methods.TWO_INSTANCES, methods.SIMPLE, methods.HIERARCHICAL, methods.NO_SCALING):
        state = started(method).modules[0].state_dict()
        assert all(torch.equal(state[name], value) for name, value in single.items()), method


@pytest.mark.slow
def test_scalings_differ_by_the_number_of_heads_as_table_3_has_it() -> None:
    images, labels = next(iter(digits().train(0, 0, 64)))
    found = {}
    for method in (methods.NO_SCALING, methods.LOSS_SCALING, methods.RESCALED):
        training = started(method)
        training.optimizers[0].param_groups[0]["lr"] = 0.0
        training.step(images, labels)
        network = training.modules[0]
        found[method] = network.conv1.weight.grad, network.fc.weight.grad
    none, loss, rescaled = (found[m] for m in (methods.NO_SCALING, methods.LOSS_SCALING, methods.RESCALED))
    torch.testing.assert_close(none[0] / 4, rescaled[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss[0], rescaled[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(none[1], rescaled[1])
    torch.testing.assert_close(loss[1], rescaled[1] / 4)


class InterruptedRunError(Exception):
    """As by a kill."""


def dropping() -> nn.Module:
    """A network that draws random numbers."""
    return nn.Sequential(build(), nn.Dropout(0.2))


def of(model: nn.Module) -> Training:
    optimizer = RECIPE.optimizer(model.parameters())
    loss = fxcollab.CollaborativeLoss(0.5 if isinstance(model, fxcollab.CollabGraphModule) else 1)
    return Training(
        (model,), simultaneous(model, lambda outputs, y, x: loss(outputs, y), optimizer, RECIPE), (optimizer,)
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", slow_but([4], range(6)))
def test_a_run_that_is_interrupted_goes_on_to_the_same_numbers(step: int, tmp_path: Path) -> None:
    taken = iter(range(100))

    def interrupt(loss: Tensor) -> None:
        if next(taken) == step:
            raise InterruptedRunError

    def trained(**options: Any) -> tuple[dict[str, Tensor], list[float]]:
        torch.manual_seed(1)
        training = of(fxcollab.transform(dropping, splits=["0.stage1", "0.stage2"], seed=1))
        losses: list[float] = []
        kept = Kept(tmp_path / "run.pt", {"seed": 1}) if options else None
        options |= {"before": lambda epoch: losses.append(epoch.loss)}
        losses += [epoch.loss for epoch in epochs(training, data, RECIPE, 1, kept=kept, **options)]
        return training.modules[0].state_dict(), losses

    data = replace(digits(256), noise=0.2)
    straight, losses = trained()
    with pytest.raises(InterruptedRunError):
        trained(each_step=interrupt)
    resumed, found = trained(each_step=lambda loss: None)
    assert found == losses
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_an_epoch_is_done_once_it_was_written_down(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "run.pt", {})
    running = epochs(of(build()), digits(256), RECIPE, 1, kept=kept)
    assert next(running).number == 1
    assert not kept.file.exists(), "a kill here repeats the epoch"
    assert next(running).number == 2
    assert kept.file.exists()


def test_what_is_kept_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    list(epochs(of(build()), digits(256), replace(RECIPE, epochs=1), 1, kept=Kept(file, {"--seed": 1, "--beta": 1})))
    with pytest.raises(ValueError, match="--seed was 1 and is 2; give the same options"):
        list(epochs(of(build()), digits(256), RECIPE, 1, kept=Kept(file, {"--seed": 2, "--beta": 1})))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        list(epochs(of(build()), digits(256), RECIPE, 1, kept=Kept(file, {"--seed": 1})))


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than the training set"):
        next(epochs(of(build()), digits(100), RECIPE, 1))


def test_lines_that_were_not_finished_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines.append(file, {"a": 1})
    with file.open("a") as output:
        output.write('{"a": 2, "b')
    assert lines.read(file) == [{"a": 1}]
    lines.append(file, {"a": 3})
    assert lines.read(file) == [{"a": 1}, {"a": 3}]


def test_errors_are_counted_for_every_head_and_their_mean() -> None:
    model = fxcollab.transform(nn.Linear(7, 7, bias=False), "multi-instance", heads=3, seed=0)
    with torch.no_grad():
        for head, sign in enumerate((1.0, -0.4, -0.4)):
            list(model.parameters())[head].copy_(sign * torch.eye(7))
    x = torch.eye(7)
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 0])
    found = errors(model, [(x[:4], labels[:4]), (x[4:], labels[4:])])
    assert found.heads[0] == found.ensemble == pytest.approx(3 / 7)  # the mean of 1, -0.4 and -0.4 is above 0
    assert found.heads[1] > 0.5
    ranks = x.topk(5).indices
    assert found.top5 == pytest.approx(
        sum(int(y) not in rank for y, rank in zip(labels, ranks.tolist(), strict=True)) / 7
    )


def test_a_structure_is_read_as_a_network_of_one_head() -> None:
    class Structured(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x}

    assert errors(Structured(), [(torch.eye(3), torch.arange(3))]).heads == (0.0,)


def test_figures_of_one_network_are_not_mixed_with_those_of_others() -> None:
    for name in ("figure3", "table3"):
        assert {run.setting.network for run in EXPERIMENTS[name].runs("paper")} == {"ResNet-32"}
    assert len({run.setting.network for run in EXPERIMENTS["table1"].runs("paper")}) == 3


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    for part, kinds in (("train", "abc"), ("val", "ac")):
        for kind in kinds:
            (tmp_path / part / kind).mkdir(parents=True)
            Image.new("L", (40, 30)).save(tmp_path / part / kind / "0.png")
    with pytest.raises(ValueError, match="don't hold the same classes: b"):
        data_set("folder", tmp_path)


@pytest.mark.parametrize("name", ["FakeData", "EMNIST", "Caltech101"])
def test_sets_without_a_part_to_test_on_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parts named train and test"):
        data_set(name, tmp_path)


def test_other_heads_are_counted_where_they_disagree_with_head_0() -> None:
    model = fxcollab.transform(nn.Linear(3, 3, bias=False), "multi-instance", heads=3, seed=0)
    with torch.no_grad():
        for parameter, sign in zip(model.parameters(), (1.0, 1.0, -1.0), strict=True):
            parameter.copy_(sign * torch.eye(3))
    x = torch.eye(3)
    assert errors(model, [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(1))]).disagreement == pytest.approx(1 / 2)
    assert errors(nn.Identity(), [(x, torch.arange(3))]).disagreement == 0


def test_a_table_is_normalised_by_its_training_rows_and_given_as_it_is() -> None:
    data = breast_cancer(300)
    assert data.images.shape == (300, 30) and data.test_images.shape == (269, 30)
    torch.testing.assert_close(data.images.mean(0), torch.zeros(30), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.images.std(0), torch.ones(30), rtol=0, atol=1e-5)
    rows, labels = zip(*data.test(100), strict=True)
    assert torch.equal(torch.cat(rows), data.test_images) and torch.equal(torch.cat(labels), data.test_labels)


def test_texts_are_indices_of_the_commonest_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cats").write_text("a cat\n%\na cat, a cat\n%\na cat purrs\n")
    (tmp_path / "dogs").write_text("a dog\n%\na dog barks\n")
    (tmp_path / "dogs.dat").write_bytes(b"\x00")
    (tmp_path / "small").write_text("none\n")
    monkeypatch.setattr(prepared, "FORTUNES", tmp_path)
    data = prepared.fortunes(4, topics=2, words=4, length=3)
    assert sorted([*data.labels.tolist(), *data.test_labels.tolist()]) == [0, 0, 0, 1, 1]
    texts = torch.cat([data.images, data.test_images])
    assert texts.shape == (5, 3) and texts.max() == 3, "two words, padding, and one for all others"
    assert set(texts[:, 0].tolist()) == {2}, "every text begins with the commonest word"


@pytest.mark.parametrize("objective", ["mutual", "KDCL", "ONE"])
def test_objectives_of_other_papers_train_the_same_tree(objective: str) -> None:
    method = methods.Other(objective, "simple", 2, splits=("stage1",), objective=objective)
    trained = methods.training(method, NETWORKS["three convolutions"], ConvNet, RECIPE, 0)
    assert len(trained.modules) == 2 and bool([*trained.modules[1].parameters()]) == (objective == "ONE")
    before = [parameter.clone() for module in trained.modules for parameter in module.parameters()]
    assert trained.step(*next(iter(digits().train(0, 0, 64)))).isfinite()
    after = [parameter for module in trained.modules for parameter in module.parameters()]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
