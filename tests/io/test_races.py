"""Several writers of one output, writers that are killed, and what appears meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fxcollab
from fxcollab.errors import OutputError
from fxcollab.io import files, rename
from fxcollab.io.weights import load_state_dict, write_state_dict
from tests.io.helpers import Net, content, made


@pytest.fixture
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the renames of Linux, and without."""
    if request.param == "two steps":
        monkeypatch.setattr(rename, "_renamed", lambda *_: False)
    return str(request.param)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


both_systems = pytest.mark.parametrize("system", ["renameat2", "two steps"], indirect=True)


@both_systems
@pytest.mark.parametrize("name", ["run", "head"])
def test_what_appears_during_a_write_is_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, name: str
) -> None:
    target, put = tmp_path / name, files._put

    def others_come_first(*arguments: object) -> None:
        target.mkdir()
        (target / "thesis.txt").write_text("precious")
        put(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "_put", others_come_first)
    for force in (False, True):
        with pytest.raises(OutputError) as caught:
            if name == "run":
                fxcollab.save(made(Net), target, force=force)
            else:
                write_state_dict({"w": torch.ones(2)}, target, force=force)
        assert caught.value.where == str(target)
        assert content(target) == {"thesis.txt": b"precious"} and names(tmp_path) == [name]
        (target / "thesis.txt").unlink()
        target.rmdir()


@both_systems
def test_what_takes_an_artifacts_place_between_the_check_and_the_swap_is_put_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    check, calls = files.artifact_only, []

    def check_and_lose(folder: Path) -> None:
        check(folder)
        calls.append(folder)
        if len(calls) == 2:  # just before the swap
            saved.rename(saved.with_name("elsewhere"))
            saved.mkdir()
            (saved / "plan.json").write_text('{"terraform": 1}')

    monkeypatch.setattr(files, "artifact_only", check_and_lose)
    monkeypatch.setattr("fxcollab.io.artifact.artifact_only", check_and_lose)
    with pytest.raises(OutputError, match="is not replaced"):
        fxcollab.save(made(Net), saved, force=True)
    assert content(saved) == {"plan.json": b'{"terraform": 1}'}
    assert names(saved.parent) == ["elsewhere", "run"]


@both_systems
@pytest.mark.parametrize("force", [False, True])
def test_of_four_threads_that_write_one_folder_every_loser_is_told(tmp_path: Path, system: str, force: bool) -> None:
    models, ended = [made(Net, seed=seed) for seed in range(4)], {}
    start = threading.Barrier(4)

    def write(number: int) -> None:
        start.wait()
        try:
            fxcollab.save(models[number], tmp_path / "run", force=force)
            ended[number] = True
        except OutputError:
            ended[number] = False

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 4 and sum(ended.values()) >= 1 and (force or sum(ended.values()) == 1)
    state = load_state_dict(tmp_path / "run/weights.safetensors")
    won = [n for n in range(4) if all(torch.equal(state[k], v) for k, v in models[n].state_dict().items())]
    assert len(won) == 1 and ended[won[0]], "what is there was written by one that was told so"
    assert names(tmp_path) == ["run"] and fxcollab.load(tmp_path / "run")


def _write(folder: str, seed: int, force: bool, ended: Callable[[tuple[int, bool]], None]) -> None:
    for _ in range(20):
        try:
            fxcollab.save(made(Net, seed=seed), folder, force=force)
            ended((seed, True))
        except OutputError:
            ended((seed, False))


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_of_two_processes_that_write_one_folder_every_loser_is_told(tmp_path: Path, force: bool) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_write, args=(str(tmp_path / "run"), s, force, queue.put)) for s in (1, 2)]
    for worker in workers:
        worker.start()
    ended = [queue.get() for _ in range(40)]
    for worker in workers:
        worker.join()
    assert all(done for _, done in ended) if force else sum(done for _, done in ended) == 1
    assert names(tmp_path) == ["run"] and fxcollab.load(tmp_path / "run")


def test_drafts_of_killed_writers_are_removed_and_those_at_work_and_of_others_are_not(tmp_path: Path) -> None:
    model = made(Net)

    def killed_at(module: ModuleType, step: str) -> Path:
        child = os.fork()
        if not child:
            setattr(module, step, lambda *_: os._exit(9))
            fxcollab.save(model, tmp_path / "killed")
        os.waitpid(child, 0)
        [draft] = [path for path in tmp_path.iterdir() if path.name.startswith(".killed")]
        return draft

    first, second = killed_at(files, "_put"), killed_at(rename, "_renamed")
    assert not first.exists(), "the next write, to whatever path, has removed it"
    (second / "whole" / "thesis.txt").write_text("precious")
    with files.written(tmp_path / "other", False, files.artifact_only) as at_work:
        at_work.mkdir()
        (at_work / "plan.json").write_text("half")
        fxcollab.save(model, tmp_path / "run")
        assert (at_work / "plan.json").exists()
    assert names(tmp_path) == [second.name, "other", "run"]
    assert content(second / "whole") == {"thesis.txt": b"precious"}


@pytest.mark.parametrize("kind", ["link", "folder", "folder with a name"])
def test_what_only_looks_like_a_draft_is_not_touched(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    (precious / "data").mkdir(parents=True)
    for name in ("of", "thesis.txt", "data/inner.txt"):
        (precious / name).write_text("run" if kind == "folder with a name" else "precious")
    draft = tmp_path / "written" / ".run.0123456789abcdef.fxcollab"
    draft.parent.mkdir()
    draft.symlink_to(precious) if kind == "link" else precious.rename(draft)
    before = sorted(draft.resolve().rglob("*"))
    write_state_dict({"a": torch.ones(1)}, draft.parent / "head.safetensors")
    assert sorted(draft.resolve().rglob("*")) == before and (draft / "data" / "inner.txt").exists()


def told(script: str, *arguments: str) -> dict[str, Any]:
    """What a script prints; in a process of its own, since it forks, which the threads of autograd forbid."""
    command = [sys.executable, "-m", f"tests.benchmarks.trust.{script}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_kills_at_random_moments_break_nothing_and_leave_no_litter() -> None:
    assert min(told("kills", "--kills", "15", "--seed", "1")["into the work"].values()) > 0


@pytest.mark.slow
def test_mutated_artifacts_are_refused_by_name() -> None:
    found = told("fuzz", "--cases", "150", "--seed", os.environ["FXCOLLAB_SEED"])
    assert found["cases"] == sum(found["ends"].values()) == 150 and not found["faults"]
