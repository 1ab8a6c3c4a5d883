"""The exceptions that fxcollab raises: what went wrong, where, why, and a hint."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import ClassVar


class FxCollabError(Exception):
    """Base of every error of the library.

    Args:
        what: one sentence that says what went wrong.
        where: the node, module, file or source line concerned.
        why: the reason.
        hint: what the reader can do about it.

    Attributes:
        code: of the kind of error, the same in every version; a subclass without one of its own has its parent's.
        remedy: what usually helps.
    """

    code: ClassVar[str] = "FXC000"
    remedy: ClassVar[str] = "Read the message's hint."

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, hint: str | None = None
    ) -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(what, where, why, hint)

    def __str__(self) -> str:
        return "\n".join([one_paragraph(self.what), *[f"  {label}: {text}" for label, text in self.details()]])

    def details(self) -> list[tuple[str, str]]:
        """Where, why and hint, as far as they are known, without control characters."""
        found = (("where", self.where), ("why", self.why), ("hint", self.hint))
        return [(label, one_paragraph(text) if label == "where" else plain(text)) for label, text in found if text]


class CaptureError(FxCollabError):
    """The model could not be captured as a graph."""

    code = "FXC001"
    remedy = (
        "Give `example_inputs` (`--input`) like those of training; or name splits outside of what can't be traced."
    )


class ForwardError(CaptureError):
    """A forward that had to be opened can't be traced."""

    code = "FXC002"
    remedy = (
        "Take the splits that the hint names, or rewrite the line that it names; modules without a "
        "split are not opened."
    )


class GuardError(CaptureError):
    """For this input the forward takes a different branch than when it was captured."""

    code = "FXC003"
    remedy = "Give every batch the form of the example inputs, or transform anew with the other ones."


class SplitError(FxCollabError):
    """There is no such split, or the graph can't be cut there."""

    code = "FXC004"
    remedy = "List the points where the model can be cut: `fxcollab splits SOURCE`."


class PatternError(FxCollabError):
    """Pattern, heads, fan-outs and splits don't fit together."""

    code = "FXC005"
    remedy = "Give numbers and names that fit together; the hint has some that do."


class StateError(FxCollabError):
    """Parameters, buffers or a checkpoint don't fit the graph."""

    code = "FXC006"
    remedy = "Give the state of the same training model, whole."


class MixedError(StateError):
    """A checkpoint lacks tensors of a head, or has some that are another head's or another model's."""

    code = "FXC016"
    remedy = "Give the whole state of one training model: a head never gets another head's tensors."


class SourceError(FxCollabError):
    """A SOURCE could not be turned into a model."""

    code = "FXC007"
    remedy = "Name the model as one of the forms that the message lists; run the file by itself where it fails."


class ArtifactError(FxCollabError):
    """A saved artifact is missing, damaged or of another version."""

    code = "FXC008"
    remedy = (
        "Give a directory that `fxcollab transform` or `fxcollab.save` wrote, with the code that it was made from."
    )


class DamagedError(ArtifactError):
    """A file of an artifact can't be read, or is not the one that was written."""

    code = "FXC015"
    remedy = "Transform anew, or take the file from a copy that is whole."


class OutputError(ArtifactError):
    """What is to be written would replace something, or can't be written."""

    code = "FXC009"
    remedy = "Give a path that doesn't exist. `--force` replaces only what fxcollab itself wrote."


class TrustError(ArtifactError):
    """Loading would run code that someone else's plan names."""

    code = "FXC010"
    remedy = (
        "Read the code that the message names, then `--trust-source` (`trust_source=True`); or hand in the model."
    )


class LimitError(PatternError):
    """More is asked for than is ever needed, or than there is memory for."""

    code = "FXC011"
    remedy = "Ask for less. Limits lie far above use; where memory is short, `--force` goes on all the same."


class ObjectiveError(FxCollabError, ValueError):
    """A learning objective was given something it can't work with."""

    code = "FXC012"
    remedy = "Give outputs, targets and options of the shapes and ranges that the objective's documentation names."


class VerificationError(FxCollabError):
    """A proof could not be carried out."""

    code = "FXC013"
    remedy = "Give inputs on which the original model itself runs, forward and backward."


class DiffError(FxCollabError):
    """Two graphs don't belong together, or a view can't be written."""

    code = "FXC014"
    remedy = (
        "Compare a training model with its own original; name a view's file by a known ending, in a"
        " folder that exists."
    )


class ArgumentTypeError(FxCollabError, TypeError):
    """An argument of a function is of another type than it takes."""

    code = "FXC017"
    remedy = "Give a value of the type that the message names."


_MOST_SHOWN = 4000


def plain(text: str) -> str:
    """A text in which what would move the cursor, or hide, is written as an escape; cut off where it is endless."""
    shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ... and {len(text) - _MOST_SHOWN} characters"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in shown)


def one_paragraph(text: str) -> str:
    """A text as `plain` gives it, on one line."""
    return plain(text).replace("\n", "\\n")


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
