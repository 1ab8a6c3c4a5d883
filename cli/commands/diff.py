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
    prove: Prove = False,
    force: options.Force = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the training graph beside the inference graph: what is shared, cloned and inserted.

    SOURCE may also be a directory that transform wrote; what the graph looks like is then in its plan.
    """
    with working("importing"):
        from fxcollab.diffs.build import diff as difference
        from fxcollab.diffs.terminal import view
    files = tuple(output or ())
    _refuse_unwritable(files, force)
    with working(f"loading {source}"):
        train_model = training_model(context)
        other = _inference_model(inference, Planning.of(context)) if inference else None
    with working("comparing"):
        found = difference(train_model, other, training=not evaluation)
    with working("verifying" if prove else "drawing"):
        report = verified(train_model, input_shapes) if prove else None
        for file in files:
            found.save(file, report)
    for file in files:
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


def _refuse_unwritable(files: Iterable[Path], force: bool) -> None:
    """Refuse endings without a view, folders that don't exist, and files that are there, before anything is done."""
    from fxcollab.diffs.views import check_ending, is_view
    from fxcollab.errors import DiffError
    from fxcollab.io.weights import refuse_existing_file

    for file in files:
        check_ending(file)
        if not file.parent.is_dir():
            raise DiffError(
                f"{file} can't be written.", why=f"there is no folder {file.parent}", hint=f"mkdir -p {file.parent}"
            )
        refuse_existing_file(file, force)
        if file.exists() and not is_view(file):
            raise DiffError(
                f"{file} is not replaced.", why="fxcollab diff did not write it", hint="give another name, or move it"
            )
