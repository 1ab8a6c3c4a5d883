"""The application and its commands. Imports no torch, so that help and completion are fast."""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from .command import Grouped, command
from .commands import costs, diff, prune, splits, transform, verify
from .console import run
from .planning import MODEL_OPTIONS

app = typer.Typer(
    name="fxcollab",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(cls=Grouped)(command(transform))
app.command(cls=Grouped)(command(splits, MODEL_OPTIONS))
app.command(cls=Grouped)(command(costs))
app.command(cls=Grouped)(command(diff))
app.command(cls=Grouped)(command(verify))
app.command(cls=Grouped)(command(prune))


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fxcollab {version('fxcollab')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Collaborative learning for PyTorch models: several heads in training, exactly the original afterwards."""


def main() -> int:
    """Run the command line: 0 is fine, 1 a check that failed, 2 trouble, 130 interrupted."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `fxcollab verify ... | head` is not a failed check
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal can't show
    return run(app)
