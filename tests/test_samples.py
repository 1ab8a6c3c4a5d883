"""The samples on scikit-learn's digits: trainer, training script, the paper's experiments, integrations."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import fxcollab
from samples.networks.resnet_cifar import resnet_cifar
from samples.paper import methods, runs
from samples.paper.__main__ import main as paper
from samples.paper.experiments import EXPERIMENTS
from samples.paper.networks import NETWORKS, Network
from samples.paper.scales import DATA, SCALES
from samples.train import train
from samples.training import lines
from samples.training.data import data_set
from samples.training.evaluate import errors
from samples.training.in_memory import FASHION_MNIST, digits, fashion_mnist
from samples.training.noise import with_noise
from samples.training.recipe import Recipe
from samples.training.steps import simultaneous
from samples.training.trainer import Kept, Training, epochs

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


def test_all_methods_start_from_the_weights_of_the_single_instance() -> None:
    single = started(methods.SINGLE).modules[0].state_dict()
    for method in (methods.TWO_INSTANCES, methods.SIMPLE, methods.HIERARCHICAL, methods.NO_SCALING):
        state = started(method).modules[0].state_dict()
        assert all(torch.equal(state[name], value) for name, value in single.items()), method


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


@pytest.mark.parametrize("step", range(6))
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


# --- The training script ---


def command(output: Path, epochs: int) -> list[str]:
    arguments = [
        "samples/networks/resnet_cifar.py:resnet_cifar",
        "--model-arg",
        "depth=8",
        "--data",
        "digits",
        "--rgb",
    ]
    return [*arguments, "--splits", "stage1,stage2", "--epochs", str(epochs), "--batch", "256", "-o", str(output)]


def script(arguments: list[str]) -> None:
    """Run the script in this process; what it raises comes through."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train)
    app(arguments, standalone_mode=False)


def test_a_killed_run_of_the_script_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "samples.train"]
    killed = subprocess.Popen([*run, *command(tmp_path / "killed", 4)], env=environment, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed/metrics.jsonl"
    while not metrics.exists() and killed.poll() is None:
        time.sleep(0.02)
    time.sleep(random.random() / 2)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL  # and was not done before
    outputs = [
        subprocess.run(
            [*run, *command(tmp_path / name, 4)], env=environment, check=True, capture_output=True, text=True
        ).stdout
        for name in ("killed", "straight")
    ]
    metrics_of = [lines.read(tmp_path / name / "metrics.jsonl") for name in ("killed", "straight")]
    for resumed, straight in zip(*metrics_of, strict=True):
        assert {**resumed, "seconds": 0} == {**straight, "seconds": 0}
    assert [line["number"] for line in metrics_of[0]] == [1, 2, 3, 4]
    assert json.loads(outputs[0])["error"] == json.loads(outputs[1])["error"] == metrics_of[0][-1]["heads"][0]
    weights = load_file(tmp_path / "killed/weights.safetensors")
    resnet_cifar(8).load_state_dict(weights)  # strictly
    assert len(metrics_of[0][-1]["heads"]) == 4


def test_teachers_are_other_networks_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[Any] = []

    def training(method: Any, *arguments: Any, **options: Any) -> Training:
        taught.extend(arguments[4])
        return methods.training(method, *arguments, **options)

    monkeypatch.setattr(runs, "training", training)
    setting = SCALES["smoke"]["ImageNet"][0]
    runs.carry_out(runs.Run(setting, methods.DISTILLED, 0.0, 0), Path(), None)
    first, second = taught
    assert not first.training and not second.training
    assert not torch.equal(first.conv1.weight, second.conv1.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "mutual", "--beta", "1"], "no beta"),
        (["--pattern", "none", "--splits", "stage1"], "leave --splits"),
        (["--pattern", "none", "--objective", "kdcl"], "leave --objective"),
        (["--objective", "nonsense"], "it is collaborative, mutual or kdcl"),
        (["--smoothing", "1.5"], "from 0 to 1"),
    ],
)
def test_options_of_the_script_that_mean_nothing_are_refused(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*command(tmp_path / "run", 1), *options]
    if options[:2] == ["--pattern", "none"] and "--splits" not in options:
        del given[given.index("--splits") : given.index("--splits") + 2]
    with pytest.raises(ValueError, match=message):
        script(given)


def test_a_run_with_another_smoothing_is_another_run(tmp_path: Path) -> None:
    script(command(tmp_path / "run", 1))
    with pytest.raises(ValueError, match="--smoothing"):
        script([*command(tmp_path / "run", 1), "--smoothing", "0.3"])


def test_the_script_chooses_splits_where_batch_norm_sees_one_pixel(tmp_path: Path) -> None:
    network = ["torchvision:resnet18", "--model-arg", "num_classes=10", "--data", "digits", "--rgb", "--size", "32"]
    script([*network, "--epochs", "1", "--batch", "512", "-o", str(tmp_path / "run")])
    assert len(lines.read(tmp_path / "run/metrics.jsonl")[0]["heads"]) == 4


# --- The paper's experiments ---


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("smoke")
    paper(["--scale", "smoke", "--results", str(folder), "--processes", "2"])
    return folder


def test_every_table_and_figure_is_made_at_the_scale_smoke(smoke: Path) -> None:
    text = (smoke / "smoke.md").read_text()
    for name, experiment in EXPERIMENTS.items():
        assert f"## {name}: {experiment.title}" in text
        for method in experiment.methods:
            named = f"| {method.name} |" if name != "figure4" else f" {method.name} |"
            assert named in text.partition(f"## {name}")[2].partition("\n## ")[0]
    for name in ("figure3", "figure4"):
        assert (smoke / f"{name}-smoke.svg").read_text().startswith("<?xml")


def test_runs_that_are_there_are_not_made_again(smoke: Path) -> None:
    before = (smoke / "smoke.jsonl").read_text()
    text = (smoke / "smoke.md").read_text()
    paper(["table1", "--scale", "smoke", "--results", str(smoke)])
    assert (smoke / "smoke.jsonl").read_text() == before
    assert (smoke / "smoke.md").read_text() == text


def test_the_kept_network_is_head_0_of_the_training_model(smoke: Path) -> None:
    rows = [json.loads(line) for line in (smoke / "smoke.jsonl").read_text().splitlines()]
    assert all(row["error"] == row["errors of heads"][0] for row in rows)
    assert {len(row["errors of heads"]) for row in rows} == {1, 2, 4}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_of_the_experiments_split_where_the_paper_says(network: str) -> None:
    found: Network = NETWORKS[network]
    with torch.device("meta"):
        model = found.make(num_classes=10)
    for pattern, heads in (("simple", 2), ("hierarchical", 4)):
        captured = fxcollab.capture(model, found.splits[pattern])  # type: ignore[index]
        assert (
            fxcollab.partition(captured, fxcollab.HeadTree(found.splits[pattern], (2,) * (heads // 2))).tree.heads
            == heads
        )  # type: ignore[index]


def test_scales_name_what_there_is() -> None:
    for roles in SCALES.values():
        for settings in roles.values():
            assert all(setting.data in DATA and setting.network in NETWORKS for setting in settings)


# --- Where people train ---


def test_lightning_trains_and_its_checkpoint_is_pruned(tmp_path: Path) -> None:
    from samples.integrations.lightning_module import main

    assert main(2, tmp_path) < 0.5


def test_hugging_faces_trainer_trains_and_its_checkpoint_is_pruned(tmp_path: Path) -> None:
    from samples.integrations.hf_trainer import main

    assert main(2, tmp_path) < 0.8


def test_accelerate_trains_and_its_state_is_pruned() -> None:
    from samples.integrations.accelerate_loop import main

    assert main(2) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_plain_loop_trains_in_every_precision(dtype: torch.dtype) -> None:
    from samples.integrations.plain_loop import main

    assert main(1, dtype) < 0.8


def test_the_plain_loop_trains_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from samples.integrations.plain_loop import main

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert main(1, torch.bfloat16, compiled=True) < 0.8


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Two epochs in one process."""
    return launch(1, "ddp", 2, tmp_path_factory.mktemp("straight"))


@contextmanager
def alone() -> Iterator[None]:
    """The environment that torchrun gives the one process of a group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank.items():
            patch.setenv(name, value)
        yield


def launch(processes: int, strategy: str, epochs: int, folder: Path) -> dict[str, Tensor]:
    """Train in float64, in which rounding stays small over two epochs; one process is this one."""
    if processes == 1:
        from samples.integrations.distributed import main

        with alone():
            main(strategy, epochs, folder, torch.float64)
        return load_file(folder / "weights.safetensors")
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = ["samples.integrations.distributed", "--strategy", strategy, "--epochs", str(epochs), "-o", str(folder)]
    script += ["--dtype", "float64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-m", *run, "-m", *script], env=environment, check=True, capture_output=True)
    return load_file(folder / "weights.safetensors")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_of_ddp_train_as_one_does(straight: dict[str, Tensor], tmp_path: Path) -> None:
    assert_close(launch(2, "ddp", 2, tmp_path), straight)


@pytest.mark.parametrize(("strategy", "first", "then"), [("fsdp2", 2, 1), ("fsdp2", 1, 2), ("ddp", 1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    strategy: str, first: int, then: int, straight: dict[str, Tensor], tmp_path: Path
) -> None:
    launch(first, strategy, 1, tmp_path)
    assert_close(launch(then, strategy, 2, tmp_path), straight)
