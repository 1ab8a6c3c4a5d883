"""What options say in text, as values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fxcollab.tracing.interface import InputSpec


def fanouts(text: str | None) -> tuple[int, ...] | None:
    """Fan-outs written as ``2,3``."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        from fxcollab.errors import PatternError

        raise PatternError(f"Fan-outs {text!r} can't be read.", hint="write numbers: --fanouts 2,3") from None


def budget(text: str | None, option: str) -> float | None:
    """A budget written as ``1.75x`` or ``1.75``."""
    if text is None:
        return None
    try:
        return float(text.lower().removesuffix("x"))
    except ValueError:
        from fxcollab.errors import PatternError

        raise PatternError(
            f"Budget {text!r} can't be read.", hint=f"write a ratio to the original: {option} 1.75x"
        ) from None


def example_inputs(shapes: list[str] | None) -> tuple[Tensor, ...] | None:
    """Random inputs of the given shapes; None where none are given."""
    if not shapes:
        return None
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(input_spec(f"input {i}", text).make(generator) for i, text in enumerate(shapes))


def input_spec(name: str, text: str) -> InputSpec:
    """An input written as ``1x3x224x224`` or, with a type, ``2x16:int64``."""
    import torch

    from fxcollab.errors import CaptureError
    from fxcollab.tracing.interface import InputSpec

    shape, _, dtype = text.lower().partition(":")
    sizes = shape.split("x")
    known = isinstance(getattr(torch, dtype or "float32", None), torch.dtype)
    if not (known and all(size.isdecimal() and int(size) > 0 for size in sizes)):
        raise CaptureError(
            f"Input {text!r} can't be read.", hint="write sizes as in 1x3x224x224, with a type as in 2x16:int64"
        )
    return InputSpec(name, tuple(map(int, sizes)), dtype or "float32")


def default_directory(source: str) -> Path:
    """In the current one: ``model_collab`` for ``a/model.py``, ``bert_collab`` for ``hf:google/bert/``."""
    location, _, name = source.rpartition(":")
    place = location if location.endswith(".py") else name
    path = Path(os.path.normpath(Path.cwd() / place))  # `.` and `dir/` are named as their folders are
    return Path(f"{path.stem if path.suffix == '.py' else path.name}_collab")
