"""Where to split instead, when a forward that a split would open can't be captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxcollab.errors import ForwardError, FxCollabError
from fxcollab.tracing.errors import DrawnError


def with_nearest_splits(error: ForwardError, splits: Sequence[str], attempt: Callable[..., object]) -> ForwardError:
    """``error``, with a hint that names for each split that fails alone the nearest enclosing module that works.

    Args:
        error: why the model could not be captured with ``splits``.
        splits: their names.
        attempt: called with names, raises `FxCollabError` if the model can't be split at them; without any, if the
            model's own forward can't be captured.
    """
    if not _works(attempt):
        drawn = isinstance(error.__cause__, DrawnError)
        examples = "" if drawn else "give example_inputs that it takes in train and in eval mode, or "
        error.hint = (
            f"no split helps, because the model's own forward can't be traced: {examples}move the code that depends "
            f"on {'random numbers' if drawn else 'values'} into a module of its own"
        )
        return error
    nearest: dict[str | None, list[str]] = {}
    for split in splits:
        if not _works(attempt, split):
            parts = split.partition("+")[0].strip().partition("@")[0].split(".")
            around = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))  # innermost first
            found = next((outer for outer in around if _works(attempt, outer)), None)
            nearest.setdefault(found, []).append(repr(split))
    hints = [
        f"the nearest split to {' and '.join(failing)} that works is {found!r}, which stays whole"
        if found
        else f"no module around {' and '.join(failing)} can be split at, so split elsewhere"
        for found, failing in nearest.items()
    ]
    error.hint = "; ".join(hints) or error.hint or ""
    return error


def _works(attempt: Callable[..., object], *splits: str) -> bool:
    try:
        attempt(*splits)
    except FxCollabError:
        return False
    return True
