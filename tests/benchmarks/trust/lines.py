"""Command lines that are wrong in one or two places: each ends with its exit code and a message, not a traceback.

python -m tests.benchmarks.trust.lines
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from fxcollab_cli.app import app
from fxcollab_cli.console import run

import fxcollab
from tests.benchmarks.trust.fuzz import NET

LONG, DIGITS, DEEP = "x" * 5000, "9" * 5000, "[" * 100_000
PATHS = (
    "", ".", "..", "/", "nowhere", "nowhere/x", LONG, "a\0b", "loop", "loop/x", "pipe", "[bold]x[/y]", "\x1b[31m",
    "/dev/null", "mine", "folder", "model.py", "run/plan.json", "run/weights.safetensors", "/proc/x", "\udcff",
    "link",
)  # fmt: skip
NUMBERS = ("", "nan", "-1", "0", "1", "1.5", DIGITS, "two", "inf", "-inf", str(2**64), "\u0663")
MANY = ",".join(f"s{number}" for number in range(500))
VALUES = {
    "--splits": ("", ",", "a,a", "nope", "a+", "+", "a@9", "a@", f"a@{DIGITS}", LONG, "b,a", MANY),
    "--heads": NUMBERS,
    "--fanouts": (*NUMBERS, "2,2,2", "2:1:1", "auto", ",", "2,"),
    "--seed": NUMBERS[:-1],
    "--pattern": ("", "nope", "os:system", "nope:nope", "a:", ":", "[bold]", LONG),
    "--init": ("", "nope", "a=b", "=", "*=x"),
    "--granularity": ("", "nope"),
    "--recompute": ("", "all"),
    "--eval-output": ("", "none"),
    "--peers": ("", "a", "a.b", "\uff50", "1"),
    "--max-time": NUMBERS,
    "--max-memory": (*NUMBERS, "1XB"),
    "--model-arg": ("", "=", "x", "x=1", f"x={DEEP}", f"x={DIGITS}", "a b=1"),
    "--input": (
        "", "x", "2x", f"{DIGITS}x3", "99999999x99999999", "2x3:quint8", "2x3:load", "2x3:", "-1x3",
        "2x3:float8_e4m3fn", "1" + "x1" * 99,
    ),
    "--optimizer": ("nan", "inf", "-1", "1e300", "two"),
    "--depth": ("-1", DIGITS, "x"),
    "--head": (*NUMBERS[1:], "4"),
}  # fmt: skip


def prepare() -> None:
    """The files that lines are about, in the current folder."""
    Path("model.py").write_text(NET)
    Path("mine").write_text("mine")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("link").symlink_to("mine")
    os.mkfifo("pipe")
    ended(("transform", "model.py", "--splits", "a,b", "-o", "run"))


def lines() -> Iterator[tuple[str, ...]]:
    """All lines; none of them is right."""
    source = ("model.py:Net",)
    split = ("--splits", "a")
    for command, path in itertools.product(("transform", "splits", "costs", "diff", "verify"), PATHS[4:10]):
        yield command, path
    for path in PATHS:
        yield "transform", *source, *split, "-o", path
        yield "transform", *source, *split, "--force", "-o", path
        yield "prune", "run", "-o", path, "--force"
        yield "prune", path, "-o", "out"
        yield "prune", "run", "--weights", path, "-o", "out"
        yield "diff", *source, *split, "--force", "-o", path
        yield "diff", "run", path
    for option, values in VALUES.items():
        for value in values:
            command = {"--optimizer": "costs", "--depth": "splits", "--head": "prune"}.get(option, "transform")
            if command == "prune":
                yield "prune", "run", option, value, "-o", "out"
            else:
                plan = split if command != "splits" and option != "--splits" else ()
                yield command, *source, *plan, option, value, *(("-o", "out") if command == "transform" else ())
    yield from (
        (),
        ("nope",),
        ("prune",),
        ("diff", "run", "run", "run"),
        ("verify", "--nope"),
        ("verify", "run", "--seed", "1"),
    )


def ended(line: tuple[str, ...]) -> tuple[int, str]:
    """The exit code, and what was said on stderr."""
    sys.argv = ["fxcollab", *line]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return run(app), err.getvalue()


def fault(line: tuple[str, ...]) -> str | None:
    """What is wrong with how a line ended; None where it ended well."""
    code, said = ended(line)
    for made in ("out", "x"):
        if Path(made).exists():
            Path(made).unlink() if Path(made).is_file() else shutil.rmtree(made)
    if code not in (0, 2):
        return f"exit {code}: {said[-300:]}"
    if "--debug shows" in said or "Traceback" in said or (code == 2 and not said.strip()):
        return f"exit {code}: {said[-300:]!r}"
    if any(not (c.isprintable() or c == "\n") for c in said):
        return f"control characters: {said[-300:]!r}"
    kept = (
        Path("mine").read_text() == "mine"
        and not list(Path("folder").iterdir())
        and Path("model.py").read_text() == NET
    )
    return None if kept else "others' files were changed"


def main() -> None:
    """Run all lines in a random order, and print the faults."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare()
        shuffled = list(lines())
        random.Random(0).shuffle(shuffled)
        faults = 0
        for line in shuffled:
            if (said := fault(line)) is not None:
                faults += 1
                print([word[:60] for word in line], said, file=sys.stderr, flush=True)
        print(json.dumps({"fxcollab": fxcollab.__version__, "lines": len(shuffled), "faults": faults}))


if __name__ == "__main__":
    main()
