"""``fxcollab verify``."""

from __future__ import annotations

from pathlib import Path

from fxcollab_cli import options
from fxcollab_cli.console import CheckFailed, out, print_json, working


def verify(
    source: options.Source,
    pattern: options.Pattern = "hierarchical",
    splits: options.Splits = "",
    heads: options.Heads = None,
    fanouts: options.Fanouts = None,
    init: options.Init = "fresh",
    seed: options.Seed = 0,
    no_rescale: options.NoRescale = False,
    granularity: options.Granularity = "auto",
    input_shapes: options.Input = None,
    model_arg: options.ModelArg = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Prove that the training graph trains the model as promised and gives it back exactly.

    SOURCE may also be a directory that transform wrote; the options of the plan are then its own.
    Exits with 1 if any check fails.
    """
    with working("importing"):
        import fxcollab
        from fxcollab_cli.render import render_report
    with working(f"loading {source}"):
        if Path(source).is_dir():
            train_model = fxcollab.load(source)
        else:
            train_model = options.planned(
                options.load_source(source, model_arg),
                pattern, splits, heads, fanouts, input_shapes, init, seed, not no_rescale, granularity,
            )  # fmt: skip
    with working("verifying"):
        report = fxcollab.verify(train_model.root, train_model, options.example_inputs(input_shapes))
    if json:
        checks = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in report]
        print_json({"ok": report.ok, "checks": checks, "given_up": list(report.given_up)})
    else:
        render_report(report, out())
    if not report.ok:
        raise CheckFailed
