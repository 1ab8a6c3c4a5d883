"""``fxcollab transform``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..command import Force, Json
from ..console import err, out, print_json, working
from ..parsing import default_directory
from ..planning import Options
from ..render import render_summary

if TYPE_CHECKING:
    from torch.fx import GraphModule

Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to write; default: NAME_collab.")
]

PrintPasses = Annotated[bool, typer.Option("--print-passes", help="Show the graph after every pass.")]


def transform(
    options: Options,
    output: Output = None,
    print_passes: PrintPasses = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make the training graph of a model.

    It is written to a directory, and summed up. Given a directory that transform wrote, transform makes another graph
    of the model in its plan, with the plan's options where no others are given; weights start anew.
    """
    shown = output or default_directory(options.source)
    directory = shown.absolute()  # the user's code may change the working directory
    with working("importing"):
        from fxcollab.costs.original import profile_original
        from fxcollab.costs.summary import summarise
        from fxcollab.diffs.build import diff
        from fxcollab.diffs.html import to_html
        from fxcollab.io.artifact import save
        from fxcollab.io.folder import refuse_existing
    refuse_existing(directory, force)
    options, loaded = options.load()
    choice = options.choose(loaded)
    passes: list[str] = []

    def show(name: str, graph_module: GraphModule) -> None:
        passes.append(f"{name}: {graph_module.graph}\n")

    try:
        train_model = options.transform(loaded, choice, after_pass=show if print_passes else None)
    finally:  # also where a pass fails
        for text in passes:
            (err() if json else out()).print(text)
    with working(f"writing {shown}"):
        counted = profile_original(train_model)
        summary = summarise(train_model, counted)
        save(train_model, directory, force=force, page=to_html(diff(train_model, counted=counted)))
    if json:
        print_json({"directory": str(shown), **({"choice": choice.to_json()} if choice else {}), **summary.to_json()})
    else:
        render_summary(summary, choice)
    err().print(f"wrote {shown}/, to be loaded by fxcollab.load({str(shown)!r})")
