"""Runs a document as a reader would: block by block, in one process, in a folder with the samples in it.

Python blocks share their names. One that begins with ``# NAME.py`` is a file to be written. A ``text`` block is what
the block before it prints; a ``console`` block holds commands after ``$`` and what they print, where a line ``...``
stands for any lines and ``...`` in a line for any text. Commands of fxcollab run in this process, others by a shell.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fxcollab_cli.app import app
from fxcollab_cli.console import run as run_app

from fxcollab import patterns
from tests.documents.reading import ROOT, Block, blocks

INSTALLS = re.compile(r"\b(pip install|venv|conda create|conda activate|apt-get|uv pip|uv venv)\b")
"""Commands that set up an environment: what they name is compared with what is declared."""


def play(document: str, folder: Path, slow: bool = False) -> int:
    """Run a document's blocks, the slow ones only if ``slow``; returns how many."""
    found = [block for block in blocks(document) if block.is_run and (slow or not block.is_slow)]
    (folder / "samples").symlink_to(ROOT / "samples")
    names: dict[str, Any] = {"__name__": "__document__"}
    printed = ""
    with _inside(folder):
        for block in found:
            with _at(block):
                match block.language:
                    case "python":
                        printed = _python(block, names)
                    case "text":
                        assert_prints(printed, block.text)
                    case "console" | "sh":
                        printed = ""
                        for command, output in commands(block):
                            printed = _command(command, output)
                    case other:
                        raise AssertionError(f"a block of language {other!r}: python, console, sh or text")
    return len(found)


def commands(block: Block) -> Iterator[tuple[str, str | None]]:
    """Commands with what they print, or with None where that isn't shown."""
    if block.language == "sh":
        text = re.sub(r"\s*\\\n\s*", " ", block.text)
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
        yield from ((line, None) for line in lines if line)
        return
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output or None


def assert_prints(printed: str, expected: str) -> None:
    """What was printed is what the document shows; ``...`` stands for anything."""
    lines = [re.escape(line.rstrip()) for line in expected.strip("\n").splitlines()]
    pattern = "\n".join("(?:.*\n)*?.*" if line == r"\.\.\." else line.replace(r"\.\.\.", ".*") for line in lines)
    got = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())
    assert re.fullmatch(pattern, got), f"it prints\n{got}\n\nand not\n{expected}"


def _python(block: Block, names: dict[str, Any]) -> str:
    first, _, rest = block.text.partition("\n")
    if file := re.fullmatch(r"# ([\w/]+\.py)", first):
        Path(file[1]).write_text(rest)
        return ""
    code = compile("\n" * (block.line - 1) + block.text, "<document>", "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)  # what readers would paste
    return out.getvalue()


def _command(command: str, expected: str | None) -> str:
    if INSTALLS.search(command):
        return ""
    code, out, err = _fxcollab(command) if command.startswith("fxcollab ") else _shell(command)
    if expected is None:
        assert code == 0, f"$ {command}\n{err}"
    else:
        assert code in (0, 1, 2), err
        assert_prints(out + err, expected)
    return out


def _fxcollab(command: str) -> tuple[int, str, str]:
    before = sys.argv
    sys.argv = shlex.split(command)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            return run_app(app), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before


def _shell(command: str) -> tuple[int, str, str]:
    folders = (str(Path(sys.executable).parent), os.environ["PATH"])
    environment = {**os.environ, "PATH": os.pathsep.join(folders), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In the folder, as if output were piped; patterns and modules that the document makes go with it."""
    hidden = {name: os.environ.pop(name) for name in ("COLUMNS", "FORCE_COLOR", "PY_COLORS") if name in os.environ}
    modules, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder), warnings.catch_warnings(), patch.dict(patterns._registered):
            yield
    finally:
        sys.path[:] = path
        os.environ |= hidden
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


@contextlib.contextmanager
def _at(block: Block) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"in the block that begins on line {block.line}")
        raise
