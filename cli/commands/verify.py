"""``fxcollab verify``."""

from __future__ import annotations

from ..command import Json
from ..console import CheckFailed, print_json
from ..planning import Options
from ..render import render_report


def verify(options: Options, json: Json = False) -> None:
    """Prove that a training graph is right.

    It trains the model as promised, and gives it back exactly. Exits with 1 if any check fails.
    """
    report = options.verify(options.training_model())
    if json:
        checks = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in report]
        print_json({"ok": report.ok, "checks": checks, "limitations": list(report.limitations)})
    else:
        render_report(report)
    if not report.ok:
        raise CheckFailed
