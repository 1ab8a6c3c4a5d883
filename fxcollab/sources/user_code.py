"""Code that a source runs: importable from where it lies, its failures told as the source's."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxcollab.errors import SourceError


@contextmanager
def user_code(what: str, folder: Path, module_name: str, hint: str | None = None) -> Iterator[None]:
    """Run a module's code with ``folder`` importable; what it raises becomes a `SourceError`."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except SourceError:
        raise
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise SourceError(what, where=_last_line(error, module_name), why=why, hint=hint or _advice(error)) from error
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _advice(error: BaseException) -> str | None:
    if isinstance(error, SystemExit):
        return "move what the script runs under `if __name__ == '__main__':`"
    if isinstance(error, ImportError) and "relative import" in str(error):
        return "the file belongs to a package: name it as package.module:NAME"
    return None


def _last_line(error: BaseException, module_name: str) -> str | None:
    """Where the innermost frame inside the module, or inside a package that holds it, stands."""
    where = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if is_within(frame.f_globals.get("__name__", ""), module_name):
            where = f"{frame.f_code.co_filename}:{line}"
    return where


def is_within(package: str, module_name: str) -> bool:
    """Whether the module is the package, or lies in it."""
    return f"{module_name}.".startswith(f"{package}.")
