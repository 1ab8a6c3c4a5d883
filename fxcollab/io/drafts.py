"""Drafts: hidden folders beside an output, in which it is written before it takes its place.

Each has a file that its writer holds locked, so that those of writers that were killed are told, and removed.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fxcollab.io.recognise import FILES, is_generated, is_head
from fxcollab.io.rename import rename

if sys.platform != "win32":
    import fcntl

WHOLE, OLD = "whole", "old"
"""In a draft: the output once it is written, and what it replaces, where that was moved aside."""
_LOCK = "of"
_MARK = b"fxcollab's draft of "  # begins the file that is locked
_NAME = re.compile(r"\..*\.[0-9a-f]{16}\.fxcollab", re.DOTALL)
_MOST_OF_NAME = 50  # of the output in the name of its draft


@dataclass(frozen=True)
class Draft:
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
    def beside(cls, place: Path) -> Draft:
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
                    with suppress(OSError):
                        folder.rmdir()
                    raise
                draft = replace(draft, handles=(*draft.handles, lock))
                try:
                    if _locked(lock) and (draft.inside / _LOCK).exists():
                        os.write(lock, _MARK + os.fsencode(place.name))
                        return draft
                except OSError:  # the disk is full
                    draft.remove()
                    draft.close()
                    raise
                draft.close()

    @classmethod
    def opened(cls, folder: Path) -> Draft:
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
                if entry.name in (WHOLE, OLD):
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


def remove_drafts(parent: Path) -> None:
    """Remove what writers that were killed have left in a folder."""
    if sys.platform == "win32":
        return  # has no such locks
    for folder in [Path(entry) for entry in os.scandir(parent) if _NAME.fullmatch(entry.name)]:
        with suppress(OSError):
            folder.rmdir()  # killed before there was anything in it
        with suppress(OSError):
            draft = Draft.opened(folder)  # not a link, which could lead anywhere
            try:
                if os.fstat(draft.handles[0]).st_uid == os.geteuid():
                    _remove_killed(draft, parent)
            finally:
                draft.close()


def _remove_killed(draft: Draft, parent: Path) -> None:
    """Remove a draft whose writer doesn't hold it any more; what it had moved aside goes back."""
    lock = os.open(draft.inside / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mark, name = os.read(lock, len(_MARK)), os.fsdecode(os.read(lock, 4096))
        new = not mark and len(list(draft.inside.iterdir())) == 1  # whose writer gives it up, or was killed
        if mark != _MARK and not new:
            return  # no draft of ours
        if name == os.path.basename(name) and os.path.lexists(draft.inside / OLD):  # noqa: PTH119
            with suppress(OSError):
                rename(draft.inside / OLD, parent / name)  # killed between two renames
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
