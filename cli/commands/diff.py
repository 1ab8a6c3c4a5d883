"""``fxcollab diff``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .. import options
from ..console import err, out, working
from ..trained import training_model, verified

All = Annotated[bool, typer.Option("--all", help="A line for every node: nothing is folded.")]
Evaluation = Annotated[bool, typer.Option("--eval", help="Eval mode's graphs, where they differ from train mode's.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write an interactive page: one file.")]
Svg = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write a static picture.")]
Prove = Annotated[bool, typer.Option("--prove", help="With --html: verify, and show the result on the page.")]
Dot = Annotated[Path | None, typer.Option("--dot", metavar="FILE", help="Write Graphviz's DOT.")]
Mermaid = Annotated[Path | None, typer.Option("--mermaid", metavar="FILE", help="Write a Mermaid flowchart.")]


def diff(
    context: typer.Context,
    source: options.Source,
    pattern: options.Pattern = "hierarchical",
    splits: options.Splits = "",
    heads: options.Heads = None,
    fanouts: options.Fanouts = None,
    init: options.Init = "fresh",
    seed: options.Seed = 0,
    no_rescale: options.NoRescale = False,
    granularity: options.Granularity = "auto",
    peers: options.Peers = "peers",
    input_shapes: options.Input = None,
    model_arg: options.ModelArg = None,
    unfolded: All = False,
    evaluation: Evaluation = False,
    page: Html = None,
    svg: Svg = None,
    prove: Prove = False,
    dot: Dot = None,
    mermaid: Mermaid = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the training graph beside the inference graph: what is shared, cloned and inserted.

    SOURCE may also be a directory that transform wrote; what the graph looks like is then in its plan.
    """
    with working("importing"):
        from fxcollab.diff import diff as difference
        from fxcollab.diff.html import to_html
        from fxcollab.diff.svg import to_svg
        from fxcollab.diff.terminal import view
    with working(f"loading {source}"):
        train_model = training_model(context)
    with working("comparing"):
        found = difference(train_model, training=not evaluation)
    with working("verifying" if prove else "drawing"):
        report = verified(train_model, input_shapes) if prove else None
    views: list[tuple[Path | None, Callable[[], str]]] = [
        (page, partial(to_html, found, report)),
        (svg, partial(to_svg, found)),
        (dot, found.to_dot),
        (mermaid, found.to_mermaid),
    ]
    for file, text in views:
        if file is not None:
            file.write_text(text(), encoding="utf-8")
            err().print(f"wrote {file}")
    if json:
        typer.echo(found.to_json())
    elif not any(file for file, _ in views):
        out().print(view(found, unfolded=unfolded))
