"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

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
Recompute = Annotated[
    str | None,
    typer.Option("--recompute", metavar="heads", help="Keep one branch's activations at a time; compute again."),
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
