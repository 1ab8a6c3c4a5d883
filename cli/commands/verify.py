"""``fxcollab verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .. import options
from ..console import CheckFailed, out, print_json, working
from ..render import render_report

if TYPE_CHECKING:
    from fxcollab.codegen import CollabGraphModule
    from fxcollab.verify import Report

_USED_WITH_A_DIRECTORY = {"source", "input_shapes", "json", "debug"}


def verify(
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
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Prove that the training graph trains the model as promised and gives it back exactly.

    SOURCE may also be a directory that transform wrote; what the graph looks like is then in its plan.
    Exits with 1 if any check fails.
    """
    with working("importing"):
        import fxcollab
    with working(f"loading {source}"):
        if Path(source).is_dir() or _looks_like_a_directory(source):
            _refuse_options_of_the_plan(context)
            train_model = fxcollab.load(source, example_inputs=options.example_inputs(input_shapes))
        else:
            train_model = options.planned(
                options.load_source(source, model_arg, seed),
                pattern, splits, heads, fanouts, input_shapes, init, seed, not no_rescale, granularity, peers,
            )  # fmt: skip
    with working("verifying"):
        report = _verified(train_model, input_shapes)
    if json:
        checks = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in report]
        print_json({"ok": report.ok, "checks": checks, "given_up": list(report.given_up)})
    else:
        render_report(report, out())
    if not report.ok:
        raise CheckFailed


def _looks_like_a_directory(source: str) -> bool:
    """Whether a mistyped directory is more likely than a source: the error shall speak of one."""
    return ":" not in source and not source.endswith(".py")


def _refuse_options_of_the_plan(context: typer.Context) -> None:
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if (source := context.get_parameter_source(str(parameter.name))) is not None
        and source.name == "COMMANDLINE"
        and parameter.name not in _USED_WITH_A_DIRECTORY
    ]
    if given:
        from fxcollab.errors import PatternError

        raise PatternError(
            f"{', '.join(given)} can't be given with a directory.",
            why="its plan says how the graph was made",
            hint="leave the options out, or verify the model's source with them",
        )


def _verified(train_model: CollabGraphModule, shapes: list[str] | None) -> Report:
    import fxcollab

    options.check_inputs(train_model, shapes)
    try:
        return fxcollab.verify(train_model.root, train_model, options.example_inputs(shapes))
    except RuntimeError as error:
        if not shapes:
            raise
        raise options.failing_on(shapes, str(error).partition("\n")[0]) from error
