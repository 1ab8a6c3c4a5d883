"""``fxcollab diff``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..command import Force, Json
from ..console import CheckFailed, err, out, working
from ..planning import Options

if TYPE_CHECKING:
    from torch import nn

Inference = Annotated[
    str | None,
    typer.Argument(
        metavar="[INFERENCE]",
        help="A model or directory to check: it must be the same network.",
        show_default=False,
    ),
]
All = Annotated[bool, typer.Option("--all", help="A line for every node: nothing is folded.")]
Evaluation = Annotated[bool, typer.Option("--eval", help="Eval mode's graphs, where they differ from train mode's.")]
Prove = Annotated[
    bool, typer.Option("--prove", help="Verify, and show the result on the page; exits with 1 if it fails.")
]
Output = Annotated[
    list[Path] | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write a view, by its ending: .html, .svg, .png, .json, .dot, .mmd."
    ),
]


def diff(
    options: Options,
    inference: Inference = None,
    unfolded: All = False,
    evaluation: Evaluation = False,
    output: Output = None,
    prove: Prove = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Show the training graph beside the inference graph.

    Nodes are shared, cloned or inserted.
    """
    with working("importing"):
        from fxcollab.diffs.build import diff as difference
        from fxcollab.diffs.terminal import view
    files = output or []
    _refuse_unwritable(files, force)
    train_model = options.training_model(but=("model_arg",) if inference else ())
    other = _model_of(replace(options, source=inference)) if inference else None
    with working("comparing"):
        found = difference(train_model, other, training=not evaluation)
    report = options.verify(train_model) if prove else None
    with working("drawing"):
        for file in files:
            found.save(file, report)
            err().print(f"wrote {file}")
    if json:
        typer.echo(found.to_json())
    elif not files:
        out().print(view(found, unfolded=unfolded), soft_wrap=False)
    if report is not None and not report.ok:
        err().print("the proof failed: see fxcollab verify")
        raise CheckFailed


def _model_of(options: Options) -> nn.Module:
    return options.training_model(but=options.given) if options.is_directory else options.load()[1].model


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
