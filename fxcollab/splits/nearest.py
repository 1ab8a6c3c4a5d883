"""Where to split instead, when a forward that a split would open can't be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fxcollab.errors import ForwardError, FxCollabError


def with_nearest_splits(error: ForwardError, splits: Sequence[str], attempt: Callable[..., object]) -> ForwardError:
    """``error``, with a hint that names for each split that fails alone the nearest enclosing module that works.

    Args:
        error: why the model could not be captured with ``splits``.
        splits: their names.
        attempt: raises `FxCollabError` where a model can't be split at the names that it is called with; without
            any, where not even the model's own forward can be captured.
    """
    if not _works(attempt):
        error.hint = (
            "no split helps, for it is the model's own forward that resists: give example_inputs that it takes in "
            "train and in eval mode, or move the code that asks for values into a module of its own"
        )
        return error
    nearest: dict[str | None, list[str]] = {}
    for split in splits:
        if not _works(attempt, split):
            found = next((outer for outer in _enclosing(split) if _works(attempt, outer)), None)
            nearest.setdefault(found, []).append(repr(split))
    error.hint = "; ".join([_advice(found, failing) for found, failing in nearest.items()] or [error.hint or ""])
    return error


def _advice(found: str | None, failing: Sequence[str]) -> str:
    named = " and ".join(failing)
    if found is None:
        return f"no module around {named} can be split at, so split elsewhere"
    return f"the nearest split to {named} that works is {found!r}, which stays whole"


def _enclosing(split: str) -> Iterator[str]:
    """The paths of the modules around the first place of a split, innermost first."""
    atoms = split.partition("+")[0].strip().partition("@")[0].split(".")
    yield from (".".join(atoms[:length]) for length in range(len(atoms) - 1, 0, -1))


def _works(attempt: Callable[..., object], *splits: str) -> bool:
    try:
        attempt(*splits)
    except FxCollabError:
        return False
    return True
