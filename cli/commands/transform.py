"""``fxcollab transform``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options
from ..console import err, out, print_json, working
from ..parsing import default_directory
from ..planning import Planning, check_inputs
from ..render import render_choice, render_summary


def transform(
    context: typer.Context,
    source: options.Source,
    pattern: options.Pattern = "hierarchical",
    splits: options.Splits = "",
    heads: options.Heads = None,
    fanouts: options.Fanouts = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to write; default: NAME_collab.")
    ] = None,
    init: options.Init = "fresh",
    seed: options.Seed = 0,
    no_rescale: options.NoRescale = False,
    granularity: options.Granularity = "auto",
    peers: options.Peers = "peers",
    recompute: options.Recompute = None,
    max_time: options.MaxTime = None,
    max_memory: options.MaxMemory = None,
    measure: options.Measure = False,
    input_shapes: options.Input = None,
    model_arg: options.ModelArg = None,
    force: options.Force = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Turn a model into a training graph with several heads, and write it to a directory."""
    planning = Planning.of(context)
    shown = output or default_directory(source)
    directory = shown.absolute()  # the user's code may change the working directory
    with working("importing"):
        from fxcollab.costs.original import profile_original
        from fxcollab.costs.summary import summarise
        from fxcollab.diffs.build import diff
        from fxcollab.diffs.html import to_html
        from fxcollab.io.artifact import save
        from fxcollab.io.folder import refuse_existing
    refuse_existing(directory, force)
    with working(f"loading {source}"):
        loaded = planning.load()
    with working("choosing splits"):
        choice = planning.choose(loaded)
    with working("transforming"):
        train_model = planning.transform(loaded, choice)
        check_inputs(train_model, input_shapes)
        counted = profile_original(train_model)
        summary = summarise(train_model, counted)
    with working(f"writing {shown}"):
        save(train_model, directory, force=force, page=to_html(diff(train_model, counted=counted)))
    if json:
        choices = {"choice": choice.to_json()} if choice else {}
        print_json({"directory": str(shown), **choices, **summary.to_json()})
    else:
        if choice:
            render_choice(choice, out())
        render_summary(summary, out())
    err().print(f"wrote {shown}/, to be loaded by fxcollab.load({str(shown)!r})")
