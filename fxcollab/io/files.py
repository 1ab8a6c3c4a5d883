"""What is written appears whole or not at all, and nothing that fxcollab didn't write is replaced or removed.

A draft takes the place of the output in one step where the system has such a step.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fxcollab.errors import OutputError
from fxcollab.interrupts import deferred_interrupts
from fxcollab.io.drafts import OLD, WHOLE, Draft, remove_drafts
from fxcollab.io.recognise import FILES, PLAN
from fxcollab.io.rename import exchange, rename

_NEW = "new"  # in a draft: what is being written

Check = Callable[[Path], None]
"""Raises an `OutputError` where what is at a path may not be replaced."""


# What may be replaced.


def refuse_existing(target: Path, force: bool) -> None:
    """Raise an `OutputError` where the output directory exists; with ``force``, unless it is an artifact only."""
    _refuse(target, force, artifact_only, "directory")


def refuse_existing_file(file: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    """Raise an `OutputError` where the output file exists; with ``force``, unless it is ``ours``."""
    _refuse(file, force, only(ours), "file")


def only(ours: Callable[[Path], bool]) -> Check:
    """Lets regular files of one kind be replaced."""

    def check(file: Path) -> None:
        mode = file.lstat().st_mode
        if stat.S_ISDIR(mode):
            raise OutputError("The output is a directory.", where=str(file), hint=f"name a file in it: {file}/NAME")
        if not stat.S_ISREG(mode):
            raise _not_replaced(file, "it is a link, a pipe or a device")
        if not ours(file):
            raise _not_replaced(file, "it was not written by this command, or changed since")

    return check


def artifact_only(folder: Path) -> None:
    """Lets folders be replaced that hold nothing but files of an artifact."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise _not_replaced(folder, "it is not a directory")
    entries = {entry.name: entry for entry in folder.iterdir()}
    if PLAN not in entries:
        raise _not_replaced(folder, f"it has no {PLAN}, so it is not what fxcollab wrote")
    others = sorted(name for name, entry in entries.items() if name not in FILES or not FILES[name](entry))
    if others:
        names = f"{', '.join(others[:4])}{' and more' if len(others) > 4 else ''}"
        raise _not_replaced(folder, f"{names} would be lost: not written by fxcollab, or changed since")


def _not_replaced(path: Path, why: str) -> OutputError:
    hint = "give a path that does not exist, or move it away"
    return OutputError("The output is not replaced.", where=str(path), why=why, hint=hint)


def _refuse(target: Path, force: bool, check: Check, kind: str) -> None:
    with _told(target, OSError, ValueError, RuntimeError):
        if not os.path.lexists(target):
            return
        if not force:
            if kind == "file":
                only(lambda _: True)(target)  # that it is a directory says more than that it exists
            raise OutputError(
                f"The output {kind} exists.", where=str(target), hint="give another one, or force=True (--force)"
            )
        check(_place_of(target))


# Writing.


@contextmanager
def written(target: Path, force: bool, check: Check) -> Iterator[Path]:
    """The path of a draft, a file or a folder, that takes the place of ``target`` on leaving without an error.

    Args:
        target: the output; folders on the way to it are made.
        force: replace what is there, if ``check`` lets it.
        check: asked before what is there is moved aside, and again after.

    Raises:
        OutputError: the output exists, may not be replaced, or can't be written.
    """
    with _told(target, OSError, ValueError, RuntimeError):
        place = _place_of(target)
        missing = [folder for folder in place.parents if not folder.exists()]
    with _removed_on_error(missing):
        with _told(target, OSError, ValueError):
            place.parent.mkdir(parents=True, exist_ok=True)
            remove_drafts(place.parent)
        draft = None
        try:
            with _told(target, OSError, ValueError), deferred_interrupts():
                draft = Draft.beside(place)
            with _told(target, OSError):
                yield draft.inside / _NEW
                _keep_modes(draft.inside / _NEW, place)
                (draft.inside / _NEW).replace(draft.inside / WHOLE)
                _put(draft.inside / WHOLE, place, force, check)
        finally:
            with deferred_interrupts():
                if draft is not None:
                    draft.remove()
                    draft.close()


@contextmanager
def _removed_on_error(made: Sequence[Path]) -> Iterator[None]:
    """Remove the folders that were made for an output that wasn't written, if nothing else is in them."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _keep_modes(new: Path, old: Path) -> None:
    """Give an output, and the files in it, the access rights of what it replaces."""
    with suppress(FileNotFoundError):
        for path in (new, *(new.iterdir() if new.is_dir() else ())):
            before = old / path.relative_to(new)
            if not before.is_symlink() and before.exists():
                path.chmod(stat.S_IMODE(before.stat().st_mode))


@contextmanager
def _told(target: Path, *kinds: type[Exception]) -> Iterator[None]:
    """What the system says of a path is an error that names it."""
    try:
        yield
    except OutputError as error:
        error.where = str(target)  # not where it lay aside
        raise
    except FileExistsError as error:
        hint = "give another path, or force=True (--force)"
        raise OutputError("The output exists.", where=str(target), why=str(error), hint=hint) from error
    except kinds as error:
        what = "The output can't be written."
        raise OutputError(what, where=str(target), why=str(error), hint="give another path (-o)") from error


def _place_of(target: Path) -> Path:
    """The path without links before its last part; a link to a directory stands for that directory."""
    whole = target.name in ("", "..") or (target.is_symlink() and target.is_dir())
    return target.resolve() if whole else target.parent.resolve() / target.name


def _put(draft: Path, place: Path, force: bool, check: Check) -> None:
    """Move a whole draft to its place; what `check` refuses is there again afterwards."""
    while True:
        try:
            return rename(draft, place)
        except FileExistsError:
            if not force:
                raise
        with suppress(FileNotFoundError):  # it has gone meanwhile
            check(place)
            if not exchange(draft, place):
                return _put_in_two_steps(draft, place, check)
            try:
                check(draft)
            except BaseException:  # another one came between
                exchange(draft, place)
                raise
            return None


def _put_in_two_steps(draft: Path, place: Path, check: Check) -> None:
    old = draft.with_name(OLD)
    place.rename(old)
    try:
        check(old)
        rename(draft, place)
    except BaseException:
        if not os.path.lexists(place):
            rename(old, place)
        raise
