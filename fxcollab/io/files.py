"""What is written appears whole or not at all, and nothing that fxcollab didn't write is replaced or removed.

A draft lies beside the output, in a hidden folder with a file that its writer holds locked. It takes its place in one
step where the system has such a step; where the writer was killed, the next write in that folder removes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fxcollab.errors import OutputError
from fxcollab.interrupts import deferred_interrupts
from fxcollab.io.recognise import FILES, PLAN, is_generated, is_head

if sys.platform != "win32":
    import fcntl

_DRAFT = re.compile(r"\..*\.[0-9a-f]{16}\.fxcollab", re.DOTALL)
_MOST_OF_NAME = 50  # of the output in the name of its draft
_LOCK, _NEW, _WHOLE, _OLD = "of", "new", "whole", "old"
_MARK = b"fxcollab's draft of "  # begins the file that is locked
_NO_REPLACE, _EXCHANGE = 1, 2
_AT_CWD = -100

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
            _remove_drafts(place.parent)
        draft = None
        try:
            with _told(target, OSError, ValueError), deferred_interrupts():
                draft = _Draft.beside(place)
            with _told(target, OSError):
                yield draft.inside / _NEW
                _keep_modes(draft.inside / _NEW, place)
                (draft.inside / _NEW).replace(draft.inside / _WHOLE)
                _put(draft.inside / _WHOLE, place, force, check)
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


@dataclass(frozen=True)
class _Draft:
    """A hidden folder beside the output, with a file that its writer holds locked.

    Attributes:
        folder: its path.
        inside: a path that leads into it also where others may rename it, and put something else in its place.
        handles: open files: the folder, where the system can open one, and the lock.
    """

    folder: Path
    inside: Path
    handles: tuple[int, ...]

    @classmethod
    def beside(cls, place: Path) -> _Draft:
        """A new one."""
        while True:
            folder = place.parent / f".{place.name[:_MOST_OF_NAME]}.{secrets.token_hex(8)}.fxcollab"
            folder.mkdir(mode=0o700, parents=True)  # a writer that failed may have removed the folder around
            with suppress(FileNotFoundError):  # another writer took it for that of a killed one
                draft = cls.opened(folder)
                try:
                    if any(draft.inside.iterdir()):
                        raise OSError(f"{folder} was replaced meanwhile")
                    lock = os.open(draft.inside / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
                except OSError:
                    draft.close()
                    raise
                draft = replace(draft, handles=(*draft.handles, lock))
                if _locked(lock) and (draft.inside / _LOCK).exists():
                    os.write(lock, _MARK + os.fsencode(place.name))
                    return draft
                draft.close()

    @classmethod
    def opened(cls, folder: Path) -> _Draft:
        """One that is there; a link is none."""
        if sys.platform == "win32":
            return cls(folder, folder, ())
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        inside = Path(f"/proc/self/fd/{handle}")
        return cls(folder, inside if inside.exists() else folder, (handle,))

    def remove(self) -> None:
        """Remove it, but for what was moved aside into it and fxcollab didn't write."""
        with suppress(OSError):
            for entry in self.inside.iterdir():
                if entry.name in (_WHOLE, _OLD):
                    _remove_files(entry, FILES)
                elif entry.name != _LOCK:  # the draft, and files that writers of drafts make for themselves
                    _remove_files(entry, None)
            if {entry.name for entry in self.inside.iterdir()} <= {_LOCK}:
                (self.inside / _LOCK).unlink(missing_ok=True)
                self.folder.rmdir()

    def close(self) -> None:
        """Let others have it."""
        for handle in reversed(self.handles):
            os.close(handle)


def _locked(file: int) -> bool:
    """Lock a file, if no one else has; systems without locks can't tell."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def _remove_drafts(parent: Path) -> None:
    """Remove what writers that were killed have left in a folder."""
    if sys.platform == "win32":
        return  # has no such locks
    for folder in [Path(entry) for entry in os.scandir(parent) if _DRAFT.fullmatch(entry.name)]:
        with suppress(OSError):
            folder.rmdir()  # killed before there was anything in it
        with suppress(OSError):
            draft = _Draft.opened(folder)  # not a link, which could lead anywhere
            try:
                if os.fstat(draft.handles[0]).st_uid == os.geteuid():
                    _remove_killed(draft, parent)
            finally:
                draft.close()


def _remove_killed(draft: _Draft, parent: Path) -> None:
    """Remove a draft whose writer doesn't hold it any more; what it had moved aside goes back."""
    lock = os.open(draft.inside / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mark, name = os.read(lock, len(_MARK)), os.fsdecode(os.read(lock, 4096))
        new = not mark and len(list(draft.inside.iterdir())) == 1  # whose writer gives it up, or was killed
        if mark != _MARK and not new:
            return  # no draft of ours
        if name == os.path.basename(name) and os.path.lexists(draft.inside / _OLD):  # noqa: PTH119
            with suppress(OSError):
                _rename(draft.inside / _OLD, parent / name)  # killed between two renames
        draft.remove()
    finally:
        os.close(lock)


def _remove_files(path: Path, ours: Mapping[str, Callable[[Path], bool]] | None) -> None:
    """Remove a file, or a folder with the files in it; where ``ours`` says which, these alone."""
    if stat.S_ISDIR(path.lstat().st_mode):
        for file in path.iterdir():
            if stat.S_ISREG(file.lstat().st_mode) and (ours is None or (file.name in ours and ours[file.name](file))):
                file.unlink()
        path.rmdir()
    elif stat.S_ISREG(path.lstat().st_mode) and (ours is None or is_head(path) or is_generated(path)):
        path.unlink()


def _put(draft: Path, place: Path, force: bool, check: Check) -> None:
    """Move a whole draft to its place; what `check` refuses is there again afterwards."""
    while True:
        try:
            return _rename(draft, place)
        except FileExistsError:
            if not force:
                raise
        with suppress(FileNotFoundError):  # it has gone meanwhile
            check(place)
            if not _renamed(draft, place, _EXCHANGE):
                return _put_in_two_steps(draft, place, check)
            try:
                check(draft)
            except BaseException:  # another one came between
                _renamed(draft, place, _EXCHANGE)
                raise
            return None


def _put_in_two_steps(draft: Path, place: Path, check: Check) -> None:
    old = draft.with_name(_OLD)
    place.rename(old)
    try:
        check(old)
        _rename(draft, place)
    except BaseException:
        if not os.path.lexists(place):
            _rename(old, place)
        raise


def _rename(old: Path, new: Path) -> None:
    """Rename to a path that doesn't exist.

    Raises:
        FileExistsError: it does.
    """
    if _renamed(old, new, _NO_REPLACE):
        return
    if old.is_dir():
        new.mkdir()  # an empty folder of one's own may be replaced
        old.rename(new)
    else:
        os.link(old, new)
        old.unlink()


def _renamed(old: Path, new: Path, flag: int) -> bool:
    """Rename in the way that only Linux has; False where this system or file system doesn't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_CWD, os.fsencode(old), _AT_CWD, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(new))
