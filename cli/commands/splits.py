"""``fxcollab splits``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..command import Json
from ..console import print_json, working
from ..planning import Options
from ..render import render_candidates

Depth = Annotated[
    int | None,
    typer.Option(metavar="N", help="Open all modules N levels deep (default: those that do much work)."),
]


def splits(options: Options, depth: Depth = None, json: Json = False) -> None:
    """List where a model can be split, and what lies before it.

    A split is a point at which one value carries all that learns. Shares are those of a forward's operations and of
    the memory kept for the backward; what lies behind a split is what every branch repeats. Where a stage ends, the
    value's resolution changes.
    """
    options.refuse_with_directory(but=("granularity", "measure"))
    options, loaded = options.load()
    with working("counting"):
        import fxcollab

        found = fxcollab.find_splits(loaded.model, **options.arguments(fxcollab.find_splits), depth=depth)
    if json:
        print_json([asdict(candidate) | {"share": candidate.share} for candidate in found])
    else:
        render_candidates(found)
