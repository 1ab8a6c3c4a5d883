"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from fxcollab.capture.interface import InputSpec
    from fxcollab.choice import Choice
    from fxcollab.codegen import CollabGraphModule
    from fxcollab.source import Loaded

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="model.py, model.py:NAME, package.module:NAME, torchvision:NAME, timm:NAME or hf:NAME_OR_PATH",
        show_default=False,
    ),
]
ModelArg = Annotated[
    list[str] | None, typer.Option("--model-arg", metavar="K=V", help="An argument for the model's factory.")
]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", help="1x3x224x224, or 2x16:int64; again for every further input."),
]
Pattern = Annotated[str, typer.Option("--pattern", help="multi-instance, simple or hierarchical.")]
Splits = Annotated[
    str,
    typer.Option("--splits", metavar="A,B", help="Where heads part: modules, name@2, a+b, nodes, or auto."),
]
Heads = Annotated[
    int | None, typer.Option("--heads", metavar="H", help="Heads of simple and multi-instance (default 2).")
]
Fanouts = Annotated[
    str | None, typer.Option("--fanouts", metavar="F,F", help="Branches at each split (default 2 each).")
]
Init = Annotated[str, typer.Option("--init", help="How peers start: fresh, copy or copy-anyway.")]
Seed = Annotated[int, typer.Option("--seed", help="What all first weights are drawn from.")]
Granularity = Annotated[
    str, typer.Option("--granularity", help="auto opens what the splits need; op down to operations.")
]
NoRescale = Annotated[bool, typer.Option("--no-rescale", help="Add gradients up where heads meet: no mean.")]
Peers = Annotated[
    str, typer.Option("--peers", metavar="NAME", help="The name under which the other heads' state lives.")
]
MaxTime = Annotated[
    str | None,
    typer.Option("--max-time", metavar="1.75x", help="With --splits auto: what a step may take, to the original's."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="1.5x", help="With --splits auto: what a step's peak of memory may be."),
]
Measure = Annotated[bool, typer.Option("--measure", help="Time it on this machine; else FLOPs stand for time.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def load_source(text: str, model_args: list[str] | None, seed: int) -> Loaded:
    """The model that SOURCE names; where it draws its weights without a seed of its own, they follow ``seed``."""
    import torch

    from fxcollab.source import Source, parse_argument

    torch.manual_seed(seed)
    return Source.parse(text, dict(parse_argument(argument) for argument in model_args or ())).load()


def example_inputs(shapes: list[str] | None) -> tuple[Tensor, ...] | None:
    """Random inputs of the given shapes; None where none are given."""
    if not shapes:
        return None
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(input_spec(f"input {i}", text).make(generator) for i, text in enumerate(shapes))


def check_inputs(train_model: CollabGraphModule, shapes: list[str] | None) -> None:
    """Refuse given inputs on which the model fails; tried on fake tensors."""
    if not shapes:
        return
    from fxcollab.capture.examples import why_not
    from fxcollab.capture.interface import Interface
    from fxcollab.plan import plan_of

    planned = plan_of(train_model).interface
    if len(shapes) != len(planned.inputs):
        return  # binding them to the forward says so
    specs = tuple(input_spec(spec.name, text) for spec, text in zip(planned.inputs, shapes, strict=True))
    reason = why_not(train_model.root, Interface(specs, planned.fixed, planned.defaults))
    if reason:
        raise failing_on(shapes, reason)


def failing_on(shapes: list[str], why: str) -> Exception:
    """The error for given inputs on which the model fails."""
    from fxcollab.errors import CaptureError

    return CaptureError(
        f"The model fails on input {', '.join(shapes)}.",
        why=why,
        hint="give what the model takes, one --input for each of its inputs: --input 1x3x224x224",
    )


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


def chosen(
    loaded: Loaded,
    pattern: str,
    splits: str,
    heads: int | None,
    fanouts_text: str | None,
    inputs: list[str] | None,
    granularity: str,
    max_time: str | None,
    max_memory: str | None,
    measure: bool,
    optimizer: float = 1.0,
    *,
    always_measured: bool = False,
) -> Choice | None:
    """What ``--splits auto`` comes to; None where splits are named, which have no budget."""
    from fxcollab.choice import choose_splits
    from fxcollab.errors import PatternError
    from fxcollab.tree import AUTO, fanouts_to_choose, split_names

    limits = budget(max_time, "--max-time"), budget(max_memory, "--max-memory")
    if split_names(splits) != (AUTO,):
        measuring = None if always_measured else measure or None
        given = ("--max-time", max_time), ("--max-memory", max_memory), ("--measure", measuring)
        wrong = [option for option, value in given if value is not None]
        if wrong:
            raise PatternError(
                f"{', '.join(wrong)} can't be given with named splits.",
                why="their costs follow from their names",
                hint="let them be chosen: --splits auto",
            )
        return None
    return choose_splits(
        loaded.model,
        example_inputs(inputs),
        fanouts=fanouts_to_choose(pattern, heads, fanouts(fanouts_text)),
        max_time=limits[0],
        max_memory=limits[1],
        granularity=granularity,  # type: ignore[arg-type]  # refused there if unknown
        measure=measure,
        optimizer=optimizer,
    )


def planned(
    loaded: Loaded,
    pattern: str,
    splits: str | Sequence[str],
    heads: int | None,
    fanouts_text: str | None,
    inputs: list[str] | None,
    init: str,
    seed: int,
    rescale: bool,
    granularity: str,
    peers: str,
) -> CollabGraphModule:
    """The training model that the options describe."""
    import fxcollab

    return fxcollab.transform(
        loaded.model,
        pattern,  # type: ignore[arg-type]  # refused there if unknown
        splits,
        heads=heads,
        fanouts=fanouts(fanouts_text),
        example_inputs=example_inputs(inputs),
        init=init,  # type: ignore[arg-type]
        seed=seed,
        rescale=rescale,
        granularity=granularity,  # type: ignore[arg-type]
        factory=loaded.factory,
        source=loaded.source,
        peers=peers,
    )


def default_directory(source: str) -> Path:
    """In the current one: ``model_collab`` for ``a/model.py``, ``bert_collab`` for ``hf:google/bert/``."""
    location, _, name = source.rpartition(":")
    place = location if location.endswith(".py") else name
    path = Path(os.path.normpath(Path.cwd() / place))  # `.` and `dir/` are named as their folders are
    return Path(f"{path.stem if path.suffix == '.py' else path.name}_collab")


def input_spec(name: str, text: str) -> InputSpec:
    """An input written as ``1x3x224x224`` or, with a type, ``2x16:int64``."""
    import torch

    from fxcollab.capture.interface import InputSpec
    from fxcollab.errors import CaptureError

    shape, _, dtype = text.lower().partition(":")
    sizes = shape.split("x")
    known = isinstance(getattr(torch, dtype or "float32", None), torch.dtype)
    if not (known and all(size.isdecimal() and int(size) > 0 for size in sizes)):
        raise CaptureError(
            f"Input {text!r} can't be read.", hint="write sizes as in 1x3x224x224, with a type as in 2x16:int64"
        )
    return InputSpec(name, tuple(map(int, sizes)), dtype or "float32")
