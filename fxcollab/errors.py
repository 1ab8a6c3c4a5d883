"""The exceptions that fxcollab raises: what went wrong, where, why, and a hint."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType


class FxCollabError(Exception):
    """Base of every error of the library.

    Args:
        what: one sentence that says what went wrong.
        where: the node, module, file or source line concerned.
        why: the reason.
        hint: what the reader can do about it.
    """

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, hint: str | None = None
    ) -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(what, where, why, hint)

    def __str__(self) -> str:
        details = (("where", self.where), ("why", self.why), ("hint", self.hint))
        return "\n".join([self.what, *(f"  {label}: {text}" for label, text in details if text)])


class CaptureError(FxCollabError):
    """The model could not be captured as a graph."""


class ForwardError(CaptureError):
    """A forward that had to be opened can't be traced."""


class GuardError(CaptureError):
    """For this input the forward takes a different branch than when it was captured."""


class SplitError(FxCollabError):
    """There is no such split, or the graph can't be cut there."""


class PatternError(FxCollabError):
    """Pattern, heads, fan-outs and splits don't fit together."""


class StateError(FxCollabError):
    """Parameters, buffers or a checkpoint don't fit the graph."""


class SourceError(FxCollabError):
    """A SOURCE could not be turned into a model."""


class ArtifactError(FxCollabError):
    """A saved artifact is missing, damaged or of another version."""


class ObjectiveError(FxCollabError, ValueError):
    """A learning objective was given something it can't work with."""


class VerificationError(FxCollabError):
    """A proof could not be carried out."""


class DiffError(FxCollabError):
    """Two graphs don't belong together, or a view can't be written."""


def one_line(error: BaseException) -> str:
    """The type of an error, and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def warn_caller(message: str) -> None:
    """Warn at the line outside of fxcollab that called it, however deep the call is."""
    package, level = str(Path(__file__).parent), 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def closest(name: str, candidates: Iterable[str], count: int = 4) -> str:
    """The candidates most similar to ``name``, as text for a hint; "" where there is none."""
    pool = list(dict.fromkeys(candidates))
    matches = difflib.get_close_matches(name, pool, n=count, cutoff=0.5)
    leaf = name.rsplit(".", 1)[-1]
    matches += [c for c in pool if leaf and c.rsplit(".", 1)[-1] == leaf and c not in matches]
    return ", ".join(matches[:count])
