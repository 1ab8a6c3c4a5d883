"""``fxcollab diff``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options
from ..console import CheckFailed, err, out, working
from ..planning import Planning, load_source
from ..trained import names_a_directory, training_model, verified

if TYPE_CHECKING:
    from torch import nn

Inference = Annotated[
    str | None,
    typer.Argument(
        metavar="[INFERENCE]",
        help="A model or directory to be shown to be the same network; refused if it isn't.",
        show_default=False,
    ),
]
All = Annotated[bool, typer.Option("--all", help="A line for every node: nothing is folded.")]
Evaluation = Annotated[bool, typer.Option("--eval", help="Eval mode's graphs, where they differ from train mode's.")]
Prove = Annotated[bool, typer.Option("--prove", help="Verify, for the page to show; exits with 1 if a check fails.")]
Output = Annotated[
    list[Path] | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write what its ending says: .html, .svg, .png, .json, .dot, .mmd."
    ),
]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write an interactive page: one file.")]
Svg = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write a static picture.")]
Png = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write a static picture in pixels.")]
Dot = Annotated[Path | None, typer.Option("--dot", metavar="FILE", help="Write Graphviz's DOT.")]
Mermaid = Annotated[Path | None, typer.Option("--mermaid", metavar="FILE", help="Write a Mermaid flowchart.")]


def diff(
    context: typer.Context,
    source: options.Source,
    inference: Inference = None,
    pattern: options.Pattern = "hierarchical",
    splits: options.Splits = "",
    heads: options.Heads = None,
    fanouts: options.Fanouts = None,
    init: options.Init = "fresh",
    seed: options.Seed = 0,
    no_rescale: options.NoRescale = False,
    granularity: options.Granularity = "auto",
    peers: options.Peers = "peers",
    recompute: options.Recompute = None,
    input_shapes: options.Input = None,
    model_arg: options.ModelArg = None,
    unfolded: All = False,
    evaluation: Evaluation = False,
    output: Output = None,
    html: Html = None,
    svg: Svg = None,
    png: Png = None,
    dot: Dot = None,
    mermaid: Mermaid = None,
    prove: Prove = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the training graph beside the inference graph: what is shared, cloned and inserted.

    SOURCE may also be a directory that transform wrote; what the graph looks like is then in its plan.
    """
    with working("importing"):
        from fxcollab.diffs.build import diff as difference
        from fxcollab.diffs.formats import VIEWS, view_of
        from fxcollab.diffs.terminal import view
    named = {".html": html, ".svg": svg, ".png": png, ".dot": dot, ".mmd": mermaid}
    files = [(file, VIEWS[ending]) for ending, file in named.items() if file is not None]
    files += [(file, view_of(file)) for file in output or ()]
    _refuse_missing_folders(file for file, _ in files)
    with working(f"loading {source}"):
        train_model = training_model(context)
        other = _inference_model(inference, Planning.of(context)) if inference else None
    with working("comparing"):
        found = difference(train_model, other, training=not evaluation)
    with working("verifying" if prove else "drawing"):
        report = verified(train_model, input_shapes) if prove else None
        made = [(file, view_as(found, report)) for file, view_as in files]
    for file, content in made:
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        err().print(f"wrote {file}")
    if json:
        typer.echo(found.to_json())
    elif not files:
        out().print(view(found, unfolded=unfolded), soft_wrap=False)
    if report is not None and not report.ok:
        err().print("the proof failed: fxcollab verify says where")
        raise CheckFailed


def _inference_model(inference: str, planning: Planning) -> nn.Module:
    import fxcollab

    if names_a_directory(inference):
        return fxcollab.load(inference, example_inputs=planning.inputs)
    return load_source(inference, planning.model_arg, planning.seed).model


def _refuse_missing_folders(files: Iterable[Path]) -> None:
    from fxcollab.errors import DiffError

    for file in files:
        if not file.parent.is_dir():
            raise DiffError(
                f"{file} can't be written.", why=f"there is no folder {file.parent}", hint=f"mkdir -p {file.parent}"
            )
