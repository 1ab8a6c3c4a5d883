"""Values from the text of options."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fxcollab.patterns import Fanouts
    from fxcollab.plan import Plan
    from fxcollab.tracing.interface import InputSpec, Interface
    from fxcollab.tree import Fanout


_MOST_DIGITS = 16


def fanouts(text: str | None) -> Fanouts | None:
    """Fan-outs written as ``2,3``, ``2,2:1`` with one number for each branch, or ``auto``."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        each = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    except ValueError:
        from fxcollab.errors import PatternError

        hint = "write numbers: --fanouts 2,3, or --fanouts 2,2:1 with one for each branch"
        raise PatternError(f"Fan-outs {text!r} can't be read.", hint=hint) from None
    return tuple(fanout if len(fanout) > 1 else fanout[0] for fanout in each)


def example_inputs(shapes: list[str] | None, plan: Plan | None = None) -> tuple[Tensor, ...] | dict[str, Any] | None:
    """Random inputs of the given shapes, else of those in a plan, with what it fixes; None where there are none.

    By name where they are given so, or where a plan knows their names.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    planned = plan.interface if plan else None
    specs = input_specs(shapes, planned) if shapes else planned.inputs if planned else ()
    inputs = {spec.name: spec.make(generator) for spec in specs if spec.shape is not None}
    fits = planned is not None and len(specs) == len(planned.inputs)
    if planned and (fits or _named(shapes)):
        return inputs | dict(planned.fixed) or None
    return inputs if _named(shapes) else tuple(inputs.values()) or None


def input_specs(shapes: list[str], planned: Interface | None = None) -> tuple[InputSpec, ...]:
    """Inputs written as ``1x3x224x224``, with a type ``2x16:int64``, and all or none by name ``mask=2x16:bool``.

    Without names they are called as planned, if there are as many.
    """
    names, _, texts = zip(*(text.rpartition("=") for text in shapes), strict=True)
    if _named(shapes):
        _require_names(names)
    elif planned is not None and len(planned.inputs) == len(shapes):
        names = tuple(spec.name for spec in planned.inputs)
    else:
        names = tuple(f"input {i}" for i in range(len(shapes)))
    return tuple(map(_input_spec, names, texts))


def _named(shapes: list[str] | None) -> bool:
    return any("=" in text for text in shapes or ())


def _require_names(names: Collection[str]) -> None:
    from fxcollab.errors import CaptureError

    if not all(names):
        what = "Some inputs are given by name, some without."
        raise CaptureError(what, hint="name all: --input x=1x3x32x32 --input mask=1x16:bool")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CaptureError(f"The input {twice[0]} is given twice.", hint="give each input once")


def _input_spec(name: str, text: str) -> InputSpec:
    import torch

    from fxcollab.errors import CaptureError
    from fxcollab.tracing.interface import InputSpec

    shape, _, dtype = text.lower().partition(":")
    sizes = shape.split("x")
    known = isinstance(getattr(torch, dtype or "float32", None), torch.dtype)
    if not (known and all(size.isdecimal() and len(size) < _MOST_DIGITS and int(size) > 0 for size in sizes)):
        raise CaptureError(
            f"Input {text[:80]!r} can't be read.", hint="write sizes as in 1x3x224x224, with a type as in 2x16:int64"
        )
    return InputSpec(name, tuple(map(int, sizes)), dtype or "float32").checked()


def tree_options(plan: Plan) -> list[tuple[str, Any]]:
    """The options that make a plan's head tree; each depends on those before it."""
    from fxcollab.patterns import PATTERNS, arguments_for

    pattern = plan.pattern if plan.pattern in PATTERNS else "hierarchical"  # the other's code may not be here
    made_by = arguments_for(pattern, plan.tree)
    fanouts = ",".join(map(_fanout_text, plan.tree.fanouts)) if "fanouts" in made_by else None
    return [
        ("pattern", pattern),
        ("splits", ",".join(plan.tree.splits)),
        ("heads", made_by.get("heads")),
        ("fanouts", fanouts),
    ]


def _fanout_text(fanout: Fanout) -> str:
    return str(fanout) if isinstance(fanout, int) else ":".join(map(str, fanout))


def default_directory(source: str) -> Path:
    """``model_collab`` for ``a/model.py``, ``bert_collab`` for ``hf:google/bert/``; a directory itself."""
    if os.path.isdir(source):  # noqa: PTH112 (which answers for every text)
        return Path(source)
    location, _, name = source.rpartition(":")
    place = location if location.endswith(".py") else name
    path = Path(os.path.normpath(Path.cwd() / place))  # `.` and `dir/` are named as their folders are
    return Path(f"{path.stem if path.suffix == '.py' else path.name}_collab")
