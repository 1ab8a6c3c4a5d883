"""Places where people train: Lightning, transformers' Trainer, Accelerate, torchrun, a plain loop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.speeds import slow_but


@pytest.mark.slow
def test_lightning_trains_and_its_checkpoint_is_pruned(tmp_path: Path) -> None:
    from samples.integrations.lightning_module import main

    assert main(2, tmp_path) < 0.5


@pytest.mark.slow
def test_hugging_faces_trainer_trains_and_its_checkpoint_is_pruned(tmp_path: Path) -> None:
    from samples.integrations.hf_trainer import main

    assert main(2, tmp_path) < 0.8


@pytest.mark.slow
def test_accelerate_trains_and_its_state_is_pruned() -> None:
    from samples.integrations.accelerate_loop import main

    assert main(2) < 0.5


@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16, torch.float16]))
def test_the_plain_loop_trains_in_every_precision(dtype: torch.dtype) -> None:
    from samples.integrations.plain_loop import main

    assert main(1, dtype) < 0.8


@pytest.mark.slow
def test_the_plain_loop_trains_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from samples.integrations.plain_loop import main

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert main(1, torch.bfloat16, compiled=True) < 0.8


@pytest.mark.slow
def test_heads_learn_from_each_other_where_there_are_no_labels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from samples import semi_supervised

    monkeypatch.setattr(semi_supervised, "EPOCHS", 12)
    rows = semi_supervised.main(1, tmp_path / "rows.jsonl")
    assert semi_supervised.main(1, tmp_path / "rows.jsonl") == rows, "rows aren't run again"
    assert all(rows[0][way] < 0.7 for way in semi_supervised.WAYS)
    assert rows[0]["consensus on all, with a ramp"] != rows[0]["labels alone"]
    assert len(list(semi_supervised.compare(rows))) == 3


@pytest.mark.slow
def test_fine_tuning_starts_from_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from samples.integrations import fine_tuning

    monkeypatch.setattr(fine_tuning, "EPOCHS", 1)
    found = fine_tuning.main(seeds=1)
    assert found["plain"][0] == []
    assert found["finetune"][0] == ["122 of 122", *["120 of 122"] * 3]
    assert found["finetune, stages frozen"][0] == found["finetune"][0]
    assert found["fresh"][0][1:] == ["90 of 122", "60 of 122", "60 of 122"]
    assert all(0 <= error < 0.9 for _, errors in found.values() for error in errors)


@pytest.mark.slow
def test_a_detector_trains_and_finds_what_it_should() -> None:
    from samples.integrations.detection import main

    assert main(6, 64) > 0.3


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


@pytest.mark.dist
def test_two_processes_of_ddp_train_as_one_does(straight: dict[str, Tensor], tmp_path: Path) -> None:
    assert_close(launch(2, "ddp", 2, tmp_path), straight)


@pytest.mark.dist
@pytest.mark.parametrize(("strategy", "first", "then"), [("fsdp2", 2, 1), ("fsdp2", 1, 2), ("ddp", 1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    strategy: str, first: int, then: int, straight: dict[str, Tensor], tmp_path: Path
) -> None:
    launch(first, strategy, 1, tmp_path)
    assert_close(launch(then, strategy, 2, tmp_path), straight)
