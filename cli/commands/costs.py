"""``fxcollab costs``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import options
from ..console import out, print_json, working
from ..parsing import fanouts as parsed_fanouts
from ..planning import Planning
from ..render import render_costs

Optimizer = Annotated[
    float,
    typer.Option("--optimizer", metavar="N", help="Values that it holds a trained one: 1 for momentum, 2 for Adam."),
]


def costs(
    context: typer.Context,
    source: options.Source,
    pattern: options.Pattern = "hierarchical",
    splits: options.Splits = "",
    heads: options.Heads = None,
    fanouts: options.Fanouts = None,
    granularity: options.Granularity = "auto",
    max_time: options.MaxTime = None,
    max_memory: options.MaxMemory = None,
    measure: options.Measure = False,
    optimizer: Optimizer = 1.0,
    recompute: options.Recompute = None,
    input_shapes: options.Input = None,
    model_arg: options.ModelArg = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what a training step will cost, before anything is built: of the original and of the training graph."""
    planning = Planning.of(context)
    with working("importing"):
        import fxcollab
    with working(f"loading {source}"):
        loaded = planning.load()
    with working("counting"):
        choice = planning.choose(loaded, optimizer=optimizer, always_measured=True)
        found = (
            choice.costs
            if choice and not recompute
            else fxcollab.training_costs(
                loaded.model,
                pattern,  # type: ignore[arg-type]  # refused there if unknown
                choice.splits if choice else splits,
                heads,
                parsed_fanouts(fanouts),
                planning.inputs,
                granularity=granularity,  # type: ignore[arg-type]
                optimizer=optimizer,
                measure=measure,
                recompute=recompute,  # type: ignore[arg-type]
            )
        )
    if json:
        print_json(({"choice": choice.to_json()} if choice else {}) | found.to_json())
    else:
        render_costs(found, choice, out())
