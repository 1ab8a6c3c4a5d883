"""``fxcollab splits``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .. import options
from ..console import out, print_json, working
from ..planning import Planning
from ..render import render_candidates

Depth = Annotated[
    int | None,
    typer.Option("--depth", metavar="N", help="Open all modules N levels deep (default: those that do much work)."),
]


def splits(
    context: typer.Context,
    source: options.Source,
    input_shapes: options.Input = None,
    depth: Depth = None,
    granularity: options.Granularity = "auto",
    measure: options.Measure = False,
    model_arg: options.ModelArg = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List where the model can be split: every point at which one value carries all that learns.

    Shares are those of a forward's operations and of the memory kept for the backward that lie before the cut;
    what lies behind it is what every branch repeats. Where a stage ends, the value's resolution changes.
    """
    planning = Planning.of(context)
    with working("importing"):
        import fxcollab
    with working(f"loading {source}"):
        loaded = planning.load()
    with working("counting"):
        found = fxcollab.find_splits(
            loaded.model,
            planning.inputs,
            granularity=granularity,  # type: ignore[arg-type]  # refused there if unknown
            depth=depth,
            measure=measure,
        )
    if json:
        print_json([asdict(candidate) | {"share": candidate.share} for candidate in found])
    else:
        render_candidates(found, out())
