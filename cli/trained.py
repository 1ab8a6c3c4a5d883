"""The training model that a command is about: in a directory that transform wrote, or planned by options."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .parsing import example_inputs
from .planning import Planning, check_inputs, failing_on

if TYPE_CHECKING:
    from fxcollab.codegen.module import CollabGraphModule
    from fxcollab.proof.report import Report

PLANNING = {
    "pattern", "splits", "heads", "fanouts", "init", "seed", "no_rescale", "granularity", "peers", "recompute",
    "model_arg",
}  # fmt: skip
"""Options that make a plan; with a directory they can't be given."""


def training_model(context: typer.Context) -> CollabGraphModule:
    """What SOURCE and the options of ``context`` describe.

    Raises:
        PatternError: options that make a plan, given with a directory, which has one.
    """
    planning = Planning.of(context)
    if names_a_directory(planning.source):
        import fxcollab

        for_another = {"model_arg"} if context.params.get("inference") else set[str]()
        _refuse_options_of_the_plan(context, PLANNING - for_another)
        return fxcollab.load(planning.source, example_inputs=planning.inputs)
    return planning.transform(planning.load())


def names_a_directory(source: str) -> bool:
    """Whether SOURCE is a directory, or more likely a mistyped one than a source: the error shall speak of one."""
    return Path(source).is_dir() or (":" not in source and not source.endswith(".py"))


def _refuse_options_of_the_plan(context: typer.Context, refused: AbstractSet[str]) -> None:
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if (where := context.get_parameter_source(str(parameter.name))) is not None
        and where.name == "COMMANDLINE"
        and parameter.name in refused
    ]
    if given:
        from fxcollab.errors import PatternError

        raise PatternError(
            f"{', '.join(given)} can't be given with a directory.",
            why="its plan says how the graph was made",
            hint="leave the options out, or give the model's source with them",
        )


def verified(train_model: CollabGraphModule, shapes: list[str] | None) -> Report:
    """The proof, on inputs of the given shapes."""
    import fxcollab

    check_inputs(train_model, shapes)
    try:
        return fxcollab.verify(train_model.root, train_model, example_inputs(shapes))
    except RuntimeError as error:
        if not shapes:
            raise
        raise failing_on(shapes, str(error).partition("\n")[0]) from error
