"""``fxcollab costs``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..command import Json
from ..console import print_json, working
from ..planning import Options
from ..render import render_costs

Optimizer = Annotated[
    float,
    typer.Option(metavar="N", help="Values that it holds for each trained one: 1 for momentum, 2 for Adam."),
]


def costs(options: Options, optimizer: Optimizer = 1.0, json: Json = False) -> None:
    """Say what training will cost, before anything is built.

    The costs are those of a training step, of the original and of the training graph.
    """
    options.refuse_with_directory(but=("measure",))
    options, loaded = options.load()
    choice = options.choose(loaded, optimizer=optimizer, always_measured=True)
    with working("counting"):
        import fxcollab

        if choice and not options.recompute:
            found = choice.costs
        else:
            splits = {"splits": choice.splits} if choice else {}
            arguments = options.arguments(fxcollab.training_costs) | splits
            found = fxcollab.training_costs(loaded.model, **arguments, optimizer=optimizer)
    if json:
        print_json(({"choice": choice.to_json()} if choice else {}) | found.to_json())
    else:
        render_costs(found, choice)
