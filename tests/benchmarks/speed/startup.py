"""How long the command line takes to start, and to transform ResNet-50, beside what can't be avoided."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.rows import Row
from tests.benchmarks.speed.pairs import ratio

UNAVOIDABLE = """
import copy, torch, torchvision
model = torchvision.models.resnet50()
[copy.deepcopy(model.layer3), *(copy.deepcopy(torch.nn.ModuleList([model.layer4, model.fc])) for _ in range(3))]
"""
"""Importing, building, and copying the weights that four heads split at layer2 and layer3 have."""


def cases() -> Iterator[tuple[str]]:
    """The help, and the main job."""
    return ((what,) for what in ("--help", "transform torchvision:resnet50"))


def measure(what: str) -> Row:
    """Whole processes, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fxcollab_cli", *what.split()]
        if what.startswith("transform"):
            command += ["--splits", "layer2,layer3", "-o", str(Path(folder) / "out"), "--force"]
        other = "" if what == "--help" else UNAVOIDABLE
        return ratio(lambda: _run(command), lambda: _run([sys.executable, "-c", other]), pairs=5)


def conclusion(rows: list[Row]) -> str:
    """Seconds of the help, and the main job over what can't be avoided."""
    help_, main = rows
    return f"--help {help_['seconds']:.2f} s; transform {1 / main['ratio']:.2f}x of imports, model and copies"


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
