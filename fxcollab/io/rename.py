"""Renames that replace nothing, or exchange two paths in one step, where the system has them."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_NO_REPLACE, _EXCHANGE = 1, 2
_AT_CWD = -100


def rename(old: Path, new: Path) -> None:
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


def exchange(one: Path, other: Path) -> bool:
    """Exchange what is at two paths; False where this system or file system can't."""
    return _renamed(one, other, _EXCHANGE)


def _renamed(old: Path, new: Path, flag: int) -> bool:
    """Rename in the way that only Linux has; False where this system or file system doesn't."""
    in_system = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if in_system is None:
        return False
    if in_system(_AT_CWD, os.fsencode(old), _AT_CWD, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(new))
