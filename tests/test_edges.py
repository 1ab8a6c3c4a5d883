"""Hostile text in names, paths and options, limits, and streams that are closed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from fxcollab_cli.console import out
from torch import nn

import fxcollab
from fxcollab import limits
from fxcollab.errors import LimitError
from fxcollab.tracing.examples import example_tensors
from fxcollab.tracing.interface import InputSpec, Interface
from fxcollab.tree import parse_branch_name
from samples.training import checkpoint
from tests.benchmarks.trust import lines


def chain(*names: str) -> nn.Sequential:
    model = nn.Sequential()
    for name in names or ("a", "b", "c"):
        model.add_module(name, nn.Linear(3, 3))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "simple", "splits": "a", "heads": 10**9},
        {"pattern": "multi-instance", "heads": 10**30},
        {"splits": "a,b", "fanouts": (100, 100)},
        {"splits": [f"s{number}" for number in range(65)]},
        {"splits": [f"s{number}" for number in range(1000)], "pattern": "ladder"},
    ],
)
def test_more_than_is_ever_needed_is_refused_at_once(options: dict[str, Any]) -> None:
    start = time.process_time()
    with pytest.raises(fxcollab.FxCollabError, match=r"too many|too large"):
        fxcollab.transform(chain(), **options)
    assert time.process_time() - start < 2


def test_names_of_branches_are_those_that_trees_make() -> None:
    assert parse_branch_name("b0_12") == (0, 12)
    for name in ("b", "b01", "b\u0661", "b-1", "b99999", "b" + "9" * 5000, "b" + "_".join("1" * 65), "b1\n"):
        assert parse_branch_name(name) is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peers_that_do_not_fit_in_memory_are_told_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 4000)
    model = chain().to(device)  # on meta, nodes and modules take memory all the same
    with pytest.raises(LimitError, match=r"needs 0\.0 GB, and there are 0\.0 GB") as caught:
        fxcollab.transform(model, splits="a", fanouts=[64])
    assert "--force" in str(caught.value.hint)
    assert fxcollab.transform(model, splits="a", fanouts=[64], force=True)


def test_example_inputs_that_do_not_fit_in_memory_are_told_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 90)
    fits, larger = (Interface((InputSpec("x", (rows, 3), "complex64"),)) for rows in (3, 4))
    assert [value.shape for value in example_tensors(chain(), fits)] == [(3, 3)]
    with pytest.raises(LimitError, match="memory for the example inputs"):
        example_tensors(chain(), larger)


def test_the_memory_that_there_is_is_known() -> None:
    assert 0 < (limits.available_memory() or 1) < 1 << 50


def test_peers_are_named_as_python_reads_names() -> None:
    train_model = fxcollab.transform(chain(), splits="a", peers="\uff50eers")
    assert "peers.b1.b.weight" in train_model.state_dict()
    assert len(train_model(torch.ones(2, 3))) == 2


def test_modules_may_have_names_that_python_reads_as_others() -> None:
    for name in ("\ufb01", "\uff43onv", "e\u0301"):
        model = chain(name, "z", "last")
        assert fxcollab.verify(model, fxcollab.transform(model, splits=name, init="copy-anyway"))


@pytest.mark.parametrize(
    "model", [lambda: torch.jit.script(chain()), lambda: torch.export.export(chain(), (torch.ones(2, 3),))]
)
def test_what_is_no_module_of_python_is_refused_with_a_way_out(model: Any) -> None:
    with pytest.raises(fxcollab.CaptureError) as caught:
        fxcollab.transform(model(), splits="a")
    assert caught.value.hint


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_numbers_that_no_optimizer_has_are_refused(wrong: float) -> None:
    with pytest.raises(LimitError, match="0 to 1000"):
        fxcollab.training_costs(chain(), splits="a", optimizer=wrong)


def test_quantised_inputs_are_refused() -> None:
    example = torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.qint8)
    with pytest.raises(fxcollab.CaptureError, match="quantised"):
        fxcollab.transform(chain(), splits="a", example_inputs=example)


def test_messages_have_no_control_characters() -> None:
    error = fxcollab.FxCollabError("\x1b[31mred", where="a\n  hint: run me", why="one\ntwo\x07", hint="\u202egnp.exe")
    assert str(error) == ("\\x1b[31mred\n  where: a\\n  hint: run me\n  why: one\ntwo\\x07\n  hint: \\u202egnp.exe")
    assert len(str(fxcollab.FxCollabError("x" * 10**6))) < 10_000


def test_a_damaged_checkpoint_of_a_run_says_so(tmp_path: Path) -> None:
    file, model = tmp_path / "run.pt", chain()
    good = {"identity": {}, "history": [], "modules": [model.state_dict()], "optimizers": []}
    for text in (b"", b"garbage", good | {"modules": [3]}, good | {"modules": []}, good | {"identity": 3}, [1]):
        file.write_bytes(text) if isinstance(text, bytes) else torch.save(text, file)
        with pytest.raises(ValueError, match=r"run\.pt is damaged"):
            checkpoint.restore(file, {}, [model], [])


def program(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fxcollab_cli", *arguments], stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("after", [0.15, pytest.param(0.6, marks=pytest.mark.slow)])
def test_ctrl_c_is_answered_in_one_line_while_everything_is_imported(tmp_path: Path, after: float) -> None:
    (tmp_path / "model.py").write_text("import time\nwhile True: time.sleep(0.01)\n")
    # These tests may run in the background of a shell, where it is ignored.
    answered = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "cwd": tmp_path}
    with program("transform", "model.py", "--splits", "a", **answered) as process:
        time.sleep(after + 2)
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and said.strip().splitlines()[-1] == "interrupted" and "Traceback" not in said


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
def test_a_closed_or_full_output_is_trouble_and_no_file_takes_its_place() -> None:
    closed = program("--version", stdout=None, preexec_fn=lambda: os.close(1))
    assert "Standard output is closed." in closed.communicate(timeout=60)[1] and closed.returncode == 2
    with Path("/dev/full").open("w") as full:
        process = program("--version", stdout=full)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "No space left" in said and "another place" in said and "Traceback" not in said


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
def test_closed_messages_are_lost_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "from torch import nn\nmodel = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))\n"
    )
    arguments = ["transform", "model.py", "--splits", "0"]
    with program(*arguments, cwd=tmp_path, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2)) as process:
        shown = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "2 heads" in shown and (tmp_path / "model_collab").is_dir()


@pytest.mark.parametrize("columns", ["1", "12", "39"])
def test_numbers_are_whole_in_a_narrow_window(columns: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(os.environ, {"COLUMNS": columns}):
        out().print("parameters  54 -> 112  (2.07x)")
    assert capsys.readouterr().out == "parameters  54 -> 112  (2.07x)\n"


@pytest.mark.parametrize(
    "call",
    [
        lambda: fxcollab.verify(*both(), seed=2**64),
        lambda: fxcollab.transform(both()[0], splits="0", init={1: "fresh"}),
        lambda: fxcollab.transform(both()[0], splits="0", seed=2**64),
        lambda: fxcollab.CollaborativeLoss(task=3),  # type: ignore[arg-type]
        lambda: fxcollab.CollaborativeLoss(task=["classification"]),  # type: ignore[arg-type]
        lambda: fxcollab.CollaborativeLoss(temperature=1e308),
        lambda: fxcollab.transform(nn.ModuleDict({"\ud800": nn.Linear(3, 3)}), splits="0"),
    ],
)
def test_arguments_that_cannot_be_used_are_told(call: Callable[[], object]) -> None:
    with pytest.raises(fxcollab.FxCollabError):
        call()


def test_a_seed_may_be_of_numpy() -> None:
    assert fxcollab.verify(*both(), seed=numpy.int64(1))


def both() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    return model, fxcollab.transform(model, splits="0", seed=0)


@pytest.mark.skipif(os.name != "posix", reason="folders of POSIX")
def test_a_current_folder_that_was_deleted_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with subprocess.Popen(
        ["/bin/sh", "-c", f"rmdir {folder}; exec {sys.executable} -m fxcollab_cli splits model.py"],
        stderr=subprocess.PIPE, text=True, cwd=folder,
    ) as process:  # fmt: skip
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "current folder was deleted" in said and "Traceback" not in said


@pytest.mark.slow
def test_wrong_command_lines_end_with_their_exit_code(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        lines.prepare()
        chosen = random.Random(os.environ["FXCOLLAB_SEED"]).sample(list(lines.lines()), 60)
        faults = {line: said for line in chosen if (said := lines.fault(line)) is not None}
    assert not faults


def test_a_header_of_many_names_takes_no_time() -> None:
    state = {f"x{number}.peers.b1.w": torch.zeros(1) for number in range(20_000)} | {"peers.b1.w": torch.zeros(1)}
    start = time.process_time()
    fxcollab.rewriting.state_dict.unwrapped(state)
    assert time.process_time() - start < 2
