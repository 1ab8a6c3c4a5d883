"""``fxcollab verify``."""

from __future__ import annotations

import typer

from .. import options
from ..console import CheckFailed, out, print_json, working
from ..render import render_report
from ..trained import training_model, verified


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
    recompute: options.Recompute = None,
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
        import fxcollab  # noqa: F401  # takes long
    with working(f"loading {source}"):
        train_model = training_model(context)
    with working("verifying"):
        report = verified(train_model, input_shapes)
    if json:
        checks = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in report]
        print_json({"ok": report.ok, "checks": checks, "limitations": list(report.limitations)})
    else:
        render_report(report, out())
    if not report.ok:
        raise CheckFailed
