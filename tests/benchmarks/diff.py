"""The page of a difference in a real browser: ``python -m tests.benchmarks.diff``.

For each network: nodes of the training graph, bytes of the page and whether two runs make the same ones, seconds
until the first view stands in a headless Chromium, how large things are drawn then, and the slowest opening of one
box among all that the page shows. Writes ``diff.json`` to ``--results``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table
from torch import nn

import fxcollab
from fxcollab.diffs.html import to_html

RESULTS = Path(__file__).parent / "results"
OPENINGS = 5


def _giant() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("swinv2_cr_giant_224")
    return model


CASES: Mapping[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "resnet50": (torchvision.models.resnet50, ["layer2", "layer3"], "auto"),
    "vit_b_16": (
        torchvision.models.vit_b_16,
        ["encoder.layers.encoder_layer_3", "encoder.layers.encoder_layer_7"],
        "auto",
    ),
    "densenet121, op-level": (
        torchvision.models.densenet121,
        ["features.transition1", "features.transition2"],
        "op",
    ),
    "swinv2_cr_giant, op-level": (_giant, ["stages.2.blocks.13", "stages.2.blocks.27"], "op"),
}


def diff_of(name: str) -> fxcollab.Diff:
    """Of a four-headed tree over a case's network, on meta tensors."""
    make, splits, granularity = CASES[name]
    with torch.device("meta"):
        model = make()
    return fxcollab.diff(fxcollab.transform(model, splits=splits, granularity=granularity, seed=0))  # type: ignore[arg-type]


def measure(browser: Any, name: str, folder: Path) -> dict[str, Any]:
    """One line of the results."""
    diff = diff_of(name)
    page_text = to_html(diff)
    file = folder / "diff.html"
    file.write_text(page_text, encoding="utf-8")
    seconds = [_first_view(browser, file) for _ in range(OPENINGS)]
    page = _opened(browser, file)
    scale = page.evaluate("state.view.k")
    shown = page.evaluate("items.length")
    openings = page.evaluate(_OPEN_EACH)
    page.close()
    return {
        "network": name,
        "nodes": len(diff.nodes),
        "bytes": len(page_text.encode()),
        "same bytes twice": to_html(diff_of(name)) == page_text,
        "first view, s": round(statistics.median(seconds), 2),
        "drawn at": round(scale, 2),
        "things shown": shown,
        "boxes opened": len(openings),
        "slowest opening, s": round(max(openings, default=0.0) / 1000, 3),
    }


_OPEN_EACH = """() => {
    const closed = [...document.querySelectorAll('#world .closed')].map((drawn) => drawn.dataset.id);
    return closed.map((id) => {
        const start = performance.now();
        toggle(tree.get(id));
        const taken = performance.now() - start;
        toggle(tree.get(id));
        return taken;
    });
}"""


def _opened(browser: Any, file: Path) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.goto(f"file://{file}")
    page.wait_for_function("document.querySelectorAll('#world .node').length > 0")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page


def _first_view(browser: Any, file: Path) -> float:
    start = time.perf_counter()
    page = _opened(browser, file)
    taken = time.perf_counter() - start
    page.close()
    return taken


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no chromium (on Debian: apt-get install chromium)")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        rows = [measure(browser, name, Path(folder)) for name in CASES]
        version = browser.version
        browser.close()
    record = {
        "browser": f"Chromium {version}, headless, 1280x860",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    (arguments.results / "diff.json").write_text(json.dumps(record, indent=1) + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
