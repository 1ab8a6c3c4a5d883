"""Where artifacts may be written, all or nothing, as ordinary files and without pickle."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import signal
import stat
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxcollab
from fxcollab import ArtifactError
from fxcollab.io import artifact as save_module
from fxcollab.io import drafts, files, plan_file, rename, weights
from fxcollab.io.artifact import load_head
from fxcollab.io.files import only, written
from fxcollab.io.weights import write_state_dict
from tests.io.helpers import Net, assert_same, content, floats, made, randomised, refused

PACKAGE = Path(fxcollab.__file__).parent

# Where it may be written.


def test_an_existing_directory_is_refused(saved: Path) -> None:
    before = content(saved)
    error = refused(fxcollab.save, made(Net), saved)
    assert error.what == "The output directory exists." and "force" in str(error.hint)
    assert content(saved) == before


def test_force_replaces_an_artifact(saved: Path) -> None:
    train_model = randomised(made(Net, "b"))
    fxcollab.save(train_model, saved, force=True)
    assert_same(train_model, fxcollab.load(saved), floats(5, 3))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_force_replaces_nothing_but_an_artifact(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("dear")
    (tmp_path / "notes.txt").write_text("dear")
    (saved / "epoch9.pt").write_text("dear")
    for target, why in (
        (tmp_path / "photos", "it has no plan.json, so it is not what fxcollab wrote"),
        (tmp_path / "notes.txt", "it is not a directory"),
        (saved, "epoch9.pt would be lost: not written by fxcollab, or changed since"),
    ):
        error = refused(fxcollab.save, made(Net), target, force=True)
        assert "is not replaced" in error.what and error.why == why and error.where == str(target)
    assert (saved / "epoch9.pt").read_text() == (tmp_path / "photos/one.jpg").read_text() == "dear"


def test_force_keeps_a_plan_that_was_changed_since(saved: Path) -> None:
    data = json.loads((saved / "plan.json").read_text())
    (saved / "plan.json").write_text(json.dumps({**data, "notes": "the best so far"}))
    error = refused(fxcollab.save, made(Net), saved, force=True)
    assert error.why == "plan.json would be lost: not written by fxcollab, or changed since"
    assert "the best so far" in (saved / "plan.json").read_text()


def test_force_keeps_generated_files_that_were_changed_since(saved: Path) -> None:
    code = saved / "graph.py"
    as_written = code.read_text()
    for changed in (f"# slow\n{as_written}", f"{as_written}# slow\n", as_written.replace("self", "model")):
        code.write_text(changed)
        error = refused(fxcollab.save, made(Net), saved, force=True)
        assert error.why == "graph.py would be lost: not written by fxcollab, or changed since"
        assert code.read_text() == changed


def trained_on(file: Path) -> bytes:
    """Other values under the same names and metadata, as a script may write them."""
    with safe_open(file, "pt") as opened:
        metadata, state = opened.metadata(), {name: opened.get_tensor(name) + 1 for name in opened.keys()}  # noqa: SIM118
    save_file(state, file, metadata)
    return file.read_bytes()


def test_force_keeps_weights_that_were_changed_since(saved: Path, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    write_state_dict(load_head(saved), head)
    write_state_dict(load_head(saved), head, force=True)  # as it was written
    for file, write in {
        saved / "weights.safetensors": lambda: fxcollab.save(made(Net), saved, force=True),
        head: lambda: write_state_dict(Net().state_dict(), head, force=True),
    }.items():
        changed = trained_on(file)
        error = refused(write)
        assert "is not replaced" in error.what and "changed since" in str(error.why)
        assert file.read_bytes() == changed


def test_a_full_disk_leaves_no_draft_and_no_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    with monkeypatch.context() as patch:
        patch.setattr(drafts.os, "write", full)
        for _ in range(3):
            error = refused(fxcollab.save, made(Net), tmp_path / "run")
            assert "No space left" in str(error.why)
    assert not [*tmp_path.iterdir()]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    assert fxcollab.save(made(Net), tmp_path / "a/b/run") == tmp_path / "a/b/run"
    assert fxcollab.load(tmp_path / "a/b/run")


def test_access_rights_of_what_is_replaced_are_kept(saved: Path) -> None:
    saved.chmod(0o700)
    (saved / "weights.safetensors").chmod(0o600)
    fxcollab.save(made(Net()), saved, force=True)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (saved, saved / "weights.safetensors")] == [0o700, 0o600]
    head = saved.parent / "head.safetensors"
    write_state_dict({"w": torch.ones(1)}, head)
    head.chmod(0o640)
    write_state_dict({"w": torch.zeros(1)}, head, force=True)
    assert stat.S_IMODE(head.stat().st_mode) == 0o640


def test_folders_on_the_way_are_removed_where_nothing_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ArtifactError):
        write_state_dict({"w": torch.ones(1, device="meta")}, tmp_path / "a" / "b" / "c" / "head.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not list((tmp_path / "a").iterdir())


def test_force_through_a_link_replaces_what_it_points_at(saved: Path) -> None:
    link = saved.with_name("latest")
    link.symlink_to(saved, target_is_directory=True)
    train_model = made(Net, "b")
    fxcollab.save(train_model, link, force=True)
    assert link.is_symlink()
    assert list(fxcollab.load(saved).state_dict()) == list(train_model.state_dict())


# All or nothing.


STEPS = (
    (save_module, "save_state_dict"),
    (save_module, "_readable_code"),
    (save_module, "plan_to_json"),
    (plan_file, "fingerprint"),
    (files, "_put"),
)


@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
@pytest.mark.parametrize(
    "error", [pytest.param(RuntimeError("disk full"), marks=pytest.mark.slow), KeyboardInterrupt()]
)
def test_an_interrupted_save_leaves_the_old_directory_or_none(
    saved: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str, error: BaseException
) -> None:
    before, train_model = content(saved), made(Net)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, step, fail)
    for target, force in ((saved, True), (saved.with_name("new"), False)):
        with pytest.raises(type(error)):
            fxcollab.save(train_model, target, force=force)
    assert content(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_swap_that_fails_halfway_puts_the_old_directory_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    before, train_model, check, calls = content(saved), made(Net), files.artifact_only, []

    def fail_the_third_time(path: Path) -> None:  # after the one before all work, and the one before the swap
        calls.append(path)
        if len(calls) == 3:
            raise OSError("the network drive is gone")
        check(path)

    monkeypatch.setattr(files, "artifact_only", fail_the_third_time)
    monkeypatch.setattr(save_module, "artifact_only", fail_the_third_time)
    if not exchange:
        monkeypatch.setattr(rename, "_renamed", lambda *_: False)
    error = refused(fxcollab.save, train_model, saved, force=True)
    assert "network drive" in str(error.why) and error.where == str(saved) and len(calls) == 3
    assert content(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_write_of_a_state_dict_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "head.safetensors"
    write_state_dict({"w": torch.ones(2)}, file)

    def fail(unique: object, draft: Path, *_: object) -> None:
        Path(draft).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        write_state_dict({"w": torch.zeros(2)}, file, force=True)
    assert torch.equal(load_file(file)["w"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("moment", ["beside", "remove", "close"])
def test_an_interrupt_while_drafts_are_made_or_removed_leaves_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(drafts.Draft, moment, pressed(getattr(drafts.Draft, moment)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fxcollab.save(made(Net), saved, force=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]
    fxcollab.load(saved)


def pressed(function: Any) -> Any:
    """Calls ``function``, and then Ctrl-C is pressed."""

    def call(*args: Any) -> Any:
        made = function(*args)
        signal.raise_signal(signal.SIGINT)
        return made

    return call


def test_state_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = Net()
    model.b = Noted(4, 4)
    error = refused(fxcollab.save, made(model), tmp_path / "run")
    assert error.what == "State 'b._extra_state' is a dict, not a tensor." and "pickle" in str(error.why)
    assert not list(tmp_path.iterdir())


class Noted(nn.Linear):
    """Saves more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}

    def set_extra_state(self, state: object) -> None: ...


def test_tensors_that_safetensors_does_not_know_are_refused(tmp_path: Path) -> None:
    error = refused(write_state_dict, {"w": torch.eye(2).to_sparse()}, tmp_path / "w.safetensors")
    assert error.what == "State 'w' is a torch.sparse_coo tensor."
    assert not list(tmp_path.iterdir())


def test_saving_runs_no_module_and_lays_out_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_model = made(Net, "a", "b")
    run: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: run.append(module))
    try:
        folder = fxcollab.save(train_model, tmp_path / "run")
    finally:
        hook.remove()
    assert not run and not (folder / "diff.html").exists()


def test_a_page_is_written_where_one_is_given(tmp_path: Path) -> None:
    folder = fxcollab.save(made(Net, "a"), tmp_path / "run", page="<html></html>")
    assert (folder / "diff.html").read_text().startswith("<html></html>")
    fxcollab.save(made(Net, "a"), folder, force=True)
    assert not (folder / "diff.html").exists()


# No pickle, and ordinary files.


def test_nothing_in_the_folder_can_be_unpickled(saved: Path) -> None:
    files = sorted(saved.iterdir())
    assert [file.name for file in files] == ["graph.py", "plan.json", "weights.safetensors"]
    for file in files:
        with pytest.raises(Exception, match=r".*"), file.open("rb") as opened:
            pickle.load(opened)
        assert b"pickle" not in file.read_bytes() and not zipfile.is_zipfile(file)


def test_the_library_never_pickles() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {name}"
        for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "cli").rglob("*.py")])
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _pickling(node)
    ]
    assert not found


def _pickling(node: ast.AST) -> list[str]:
    """Imports of pickling modules, and calls or mentions of torch's own."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Attribute):
        names = [ast.unparse(node)]
    else:
        return []
    roots = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    return [n for n in names if n.split(".")[0] in roots or n in ("torch.save", "torch.load", "torch.package")]


def test_the_scan_for_pickling_finds_what_it_looks_for() -> None:
    for text in ("import pickle", "from pickle import loads", "torch.load('x')", "from torch import save"):
        assert any(_pickling(node) for node in ast.walk(ast.parse(text))), text


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    train_model, old = made(Net), os.umask(mask)
    try:
        fxcollab.save(train_model, tmp_path / "run")
        fxcollab.save(train_model, tmp_path / "run", force=True)
        write_state_dict(load_head(tmp_path / "run"), tmp_path / "head.safetensors")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*tmp_path.rglob("*"),)}
    assert modes.pop("run") == 0o777 & ~mask
    assert set(modes) == {"graph.py", "plan.json", "weights.safetensors", "head.safetensors"}
    assert set(modes.values()) == {0o666 & ~mask}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no path leads into an open folder")
def test_a_draft_that_others_put_a_link_in_place_of_is_left_alone(tmp_path: Path) -> None:
    """Where others may rename what is in a folder, as in one that a group shares."""
    (tmp_path / "theirs").mkdir()
    for name in ("whole", "new", "of", "thesis.tex"):
        (tmp_path / "theirs" / name).write_text("dear")
    with written(tmp_path / "out", False, only(lambda _: True)) as draft:
        draft.write_text("mine")
        [folder] = [path for path in tmp_path.iterdir() if path.name.endswith(".fxcollab")]
        folder.rename(tmp_path / "aside")
        folder.symlink_to(tmp_path / "theirs")
    assert (tmp_path / "out").read_text() == "mine"
    assert {path.name: path.read_text() for path in (tmp_path / "theirs").iterdir()} == dict.fromkeys(
        ("whole", "new", "of", "thesis.tex"), "dear"
    )
