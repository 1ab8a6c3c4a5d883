"""The samples' training script and the paper's experiments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file

import fxcollab
from fxcollab.io.weights import write_state_dict
from samples.networks.resnet_cifar import resnet_cifar
from samples.paper import methods, runs
from samples.paper.__main__ import main as paper
from samples.paper.experiments import EXPERIMENTS
from samples.paper.networks import NETWORKS, Network
from samples.paper.scales import DATA, SCALES, data_of
from samples.train import train
from samples.training import evaluate, lines
from samples.training.data import data_set
from samples.training.evaluate import Errors
from samples.training.in_memory import InMemory, digits
from samples.training.noise import mislabelled
from samples.training.trainer import Training
from tests.speeds import slow_but

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


@pytest.mark.parametrize("document", sorted(Path("samples/guides").glob("*.md")), ids=lambda path: path.stem)
def test_commands_in_documents_have_only_options_that_there_are(document: Path) -> None:
    app = typer.Typer()
    app.command()(train)
    known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    lines = [line for line in document.read_text().splitlines() if "python -m samples.train " in line]
    assert not {word for line in lines for word in line.split() if word.startswith("-") and word != "-m"} - known


def test_wrong_labels_are_a_share_of_all_and_stay_so() -> None:
    labels = torch.arange(10).repeat(100)
    wrong = mislabelled(labels, 0.3, 10)
    assert (wrong != labels).sum() == 300 and wrong.max() < 10 and torch.equal(wrong, mislabelled(labels, 0.3, 10))
    noisy = data_set("digits", Path(), noise=0.5)
    assert isinstance(noisy, InMemory)
    assert (noisy.labels != digits().labels).float().mean() == pytest.approx(0.5, abs=1e-3)
    for noise, data in ((1.5, "digits"), (0.1, "folder")):
        with pytest.raises((ValueError, FileNotFoundError)):
            data_set(data, Path("nowhere"), noise=noise)


@pytest.mark.slow
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


def test_samples_to_stop_by_are_not_trained_on_and_wrong_labels_stay(tmp_path: Path) -> None:
    setting = replace(SCALES["smoke"]["CIFAR-10"][0], held_out=56)
    trained, held_out = data_of(setting, tmp_path, 0.5)
    (whole, _) = data_of(replace(setting, held_out=0), tmp_path, 0.0)
    assert isinstance(trained, InMemory) and isinstance(held_out, InMemory) and isinstance(whole, InMemory)
    assert torch.equal(torch.cat([trained.images, held_out.test_images]), whole.images)
    assert (torch.cat([trained.labels, held_out.test_labels]) != whole.labels).sum() == 128
    assert torch.equal(trained.test_labels, whole.test_labels)
    for epoch in range(2):
        ((_, labels),) = trained.train(epoch, 0, 200)
        assert torch.equal(labels.sort().values, trained.labels.sort().values)


def test_the_epoch_to_stop_at_is_that_with_the_fewest_errors_on_held_out_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, ...]] = []

    def errors(model: Any, batches: Any, device: Any) -> Errors:
        seen.append(evaluate.errors(model, batches, device).heads)
        return Errors((0.5 - 0.1 * (len(seen) == 3), 0.25), 0.2, 0.0, 0.0)  # the third is of the second epoch

    monkeypatch.setattr(runs, "errors", errors)
    smoke = SCALES["smoke"]["CIFAR-10"][0]
    setting = replace(smoke, held_out=56, recipe=replace(smoke.recipe, epochs=3))
    row = runs.carry_out(runs.Run(setting, methods.TWO_INSTANCES, 0.4, 0), tmp_path, tmp_path)
    assert row["stopped"] == {
        "epoch": 2, "held out": 0.4, "error": 0.5, "errors of heads": (0.5, 0.25), "error of the ensemble": 0.2,
        "disagreement": 0.0,
    }  # fmt: skip
    assert len(seen) == 8 and not list(tmp_path.iterdir())
    assert row["key"].endswith("seed 0 | 56 held out")


def test_weights_of_another_model_are_refused_before_the_script_trains(tmp_path: Path) -> None:
    write_state_dict({"w": torch.ones(2)}, tmp_path / "run" / "weights.safetensors")
    before = (tmp_path / "run" / "weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not written by this script, of which no run was here"):
        script(command(tmp_path / "run", 1))
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_run_begins_anew_where_its_checkpoint_was_deleted(tmp_path: Path) -> None:
    script(command(tmp_path / "run", 1))
    (tmp_path / "run" / "run.pt").unlink()
    script(command(tmp_path / "run", 1))
    assert (tmp_path / "run" / "run.pt").exists()


def test_what_a_line_is_written_beside_is_no_link_to_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for beside in (".rows.jsonl.part", "rows.jsonl.part"):
        (tmp_path / beside).symlink_to(tmp_path / "mine")
    lines.write(tmp_path / "rows.jsonl", [{"number": 1}])
    assert lines.read(tmp_path / "rows.jsonl") == [{"number": 1}] and not (tmp_path / "rows.jsonl").is_symlink()
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("name", ["metrics.jsonl", "weights.safetensors"])
def test_files_that_the_script_did_not_write_are_refused_before_it_trains(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"number": 1, "mine": "precious"}\n')
    with pytest.raises((ValueError, fxcollab.OutputError), match="not written by this"):
        script(command(tmp_path / "run", 1))
    assert [file.name for file in (tmp_path / "run").iterdir()] == [name]
    assert "precious" in (tmp_path / "run" / name).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "mutual", "--beta", "1"], "no beta"),
        (["--pattern", "none", "--splits", "stage1"], "leave --splits"),
        (["--pattern", "none", "--objective", "kdcl"], "leave --objective"),
        (["--objective", "nonsense"], "it is collaborative, mutual or kdcl"),
        pytest.param(["--smoothing", "1.5"], "from 0 to 1", marks=pytest.mark.slow),
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


@pytest.mark.slow
def test_a_run_with_another_smoothing_is_another_run(tmp_path: Path) -> None:
    script(command(tmp_path / "run", 1))
    with pytest.raises(ValueError, match="--smoothing"):
        script([*command(tmp_path / "run", 1), "--smoothing", "0.3"])


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_table_and_figure_is_made_at_the_scale_smoke(smoke: Path) -> None:
    text = (smoke / "smoke.md").read_text()
    for name, experiment in EXPERIMENTS.items():
        assert f"## {name}: {experiment.title}" in text
        for method in experiment.methods:
            named = f"| {method.name} |" if name != "figure4" else f" {method.name} |"
            assert named in text.partition(f"## {name}")[2].partition("\n## ")[0]
    for name in ("figure3", "figure4"):
        assert (smoke / f"{name}-smoke.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_runs_that_are_there_are_not_made_again(smoke: Path) -> None:
    before = (smoke / "smoke.jsonl").read_text()
    text = (smoke / "smoke.md").read_text()
    paper(["table1", "--scale", "smoke", "--results", str(smoke)])
    assert (smoke / "smoke.jsonl").read_text() == before
    assert (smoke / "smoke.md").read_text() == text


@pytest.mark.slow
def test_the_kept_network_is_head_0_of_the_training_model(smoke: Path) -> None:
    rows = [json.loads(line) for line in (smoke / "smoke.jsonl").read_text().splitlines()]
    assert all(row["error"] == row["errors of heads"][0] for row in rows)
    assert {len(row["errors of heads"]) for row in rows} == {1, 2, 4}


@pytest.mark.parametrize("network", slow_but(["ResNet-32"], NETWORKS))
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
