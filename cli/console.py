"""Two streams: data goes to stdout; progress, notes and errors to stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

_USUAL_WIDTH, _LEAST_WIDTH = 80, 40


class CheckFailed(Exception):  # noqa: N818
    """A check failed: exit with 1."""


class _Escaping(Console):
    """Shows what would move the cursor, or hide, as an escape: names and paths may be anything."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments, which have no control characters of their own."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else _plain(text), style, control)


def _plain(text: str) -> str:
    """As `fxcollab.errors.plain`, which can't be had without torch."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def out() -> Console:
    """Where data goes."""
    return _console(stderr=False)


def err() -> Console:
    """Where messages go."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    found = _Escaping(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)
    if found.width < _LEAST_WIDTH:  # COLUMNS=0, in which nothing can be shown
        found.width = _USUAL_WIDTH
    return found


def print_json(data: Any) -> None:
    """Data for programs."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Say on stderr what takes time, and how much; whatever the user's model prints meanwhile goes there too.

    Yields a function that says how far it is.
    """
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with (
        Progress(*columns, console=err(), transient=True, disable=not sys.stderr.isatty()) as progress,
        contextlib.redirect_stdout(sys.stderr),
        _warnings_as_notes(),
    ):
        task = progress.add_task(what, total=None)
        yield lambda done: progress.update(task, description=f"{what}: {done}")


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        finally:
            messages = (str(w.message) for w in caught if issubclass(w.category, UserWarning))
            for message in dict.fromkeys(messages):
                if not message.startswith("limitation: "):  # summaries and reports list these
                    note(message)


def note(message: str) -> None:
    """A line on stderr."""
    err().print(Text("note: ", "yellow").append(message, "default"))


def run(app: Callable[..., Any]) -> int:
    """Run the application and turn what happens into an exit code."""
    if sys.stderr is None:  # closed, as under some daemons: messages are lost
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
    except CheckFailed:
        return 1
    except (KeyboardInterrupt, typer.Abort):
        result = _INTERRUPTED
    except BaseException as error:
        if hasattr(error, "show"):  # the option parser's own
            shown = io.StringIO()
            error.show(file=shown)
            err().print(Text(shown.getvalue()), end="")
        code = getattr(error, "exit_code", error.code if isinstance(error, SystemExit) else None)
        if isinstance(code, int):
            return code
        if "--debug" in sys.argv:
            traceback.print_exception(error)
            return 2
        return _report(error)
    if result == _INTERRUPTED:  # which Typer returns, too
        err().print("interrupted")
    return result if isinstance(result, int) else 0


_INTERRUPTED = 130


def _report(error: BaseException) -> int:
    """Show an error without a traceback."""
    console = err()
    what, details = getattr(error, "what", None) or _in_short(error), [("hint", "--debug shows the traceback")]
    if isinstance(error, OSError) and error.filename is None:  # no file's
        what, details = (
            "The output can't be written.",
            [("why", str(error)), ("hint", "write it to another place: > FILE")],
        )
    elif hasattr(error, "details"):
        details = error.details()
    console.print(Text("error: ", "bold red").append(what, "default"))
    for label, text in (*details, ("code", getattr(error, "code", "FXC000"))):
        console.print(Text(f"  {label}: ", "cyan" if label == "hint" else "dim").append(text, "default"))
    return 2


def _in_short(error: BaseException) -> str:
    """The type and the first paragraph: torch adds pages."""
    return f"{type(error).__name__}: {str(error).partition(_PARAGRAPH)[0]}".removesuffix(": ")


_PARAGRAPH = "\n\n"
