"""The page of a difference in a real browser: ``python -m tests.benchmarks.diff``.

For each network and each size of the window, light and dark: what is crossed, overlaps, spills or lies outside of
the first view (`tests.page_faults`), the smallest visible text, how many rows and lanes are drawn and at what
scale; bytes of the page and whether two runs make the same ones; seconds until the first view stands, and the
slowest opening of one module of those it shows. With ``--axe FILE`` (axe-core's ``axe.min.js``, from npm) also its
violations. Writes ``diff.json`` to ``--results``, and pictures of all first views to ``--pictures``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
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
from samples.diff.unet import UNet
from tests.page_faults import measured

RESULTS = Path(__file__).parent / "results"
SIZES = ((1440, 900), (1280, 860), (768, 1024), (390, 844))


class Bert(nn.Module):
    """A mask that every layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.layers = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(4))
        self.classes = nn.Linear(32, 7)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, hidden = self.embed(tokens), mask == 0
        for layer in self.layers:
            x = x + layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        result: torch.Tensor = self.classes(x[:, 0])
        return result


def _giant() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("swinv2_cr_giant_224")
    return model


def _long() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    return nn.Sequential(*(block() for _ in range(700)))


_MODELS = torchvision.models
_TOKENS = {"tokens": torch.zeros(2, 16, dtype=torch.long), "mask": torch.ones(2, 16, dtype=torch.long)}
CASES: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "resnet50": (_MODELS.resnet50, {"splits": ["layer2", "layer3"]}),
    "unet": (UNet, {"splits": ["down2", "up2"]}),
    "bert": (Bert, {"splits": ["layers.0", "layers.2"], "example_inputs": _TOKENS}),
    "fan-outs 4 and 2": (_MODELS.resnet18, {"splits": ["layer2", "layer3"], "fanouts": (4, 2)}),
    "three levels": (_MODELS.resnet18, {"splits": ["layer1", "layer2", "layer3"]}),
    "ladder": (_MODELS.resnet18, {"splits": ["layer1", "layer2", "layer3"], "pattern": "ladder"}),
    "multi-instance": (_MODELS.resnet18, {"pattern": "multi-instance", "heads": 3}),
    "vit_b_16": (_MODELS.vit_b_16, {"splits": [f"encoder.layers.encoder_layer_{n}" for n in (3, 7)]}),
    "swin_t": (_MODELS.swin_t, {"splits": ["features.3", "features.5"]}),
    "convnext_tiny": (_MODELS.convnext_tiny, {"splits": ["features.3", "features.5"]}),
    "densenet121, operations": (
        _MODELS.densenet121,
        {"splits": ["features.transition1", "features.transition2"], "granularity": "op"},
    ),
    "long chain, operations": (_long, {"splits": ["200", "400"], "granularity": "op"}),
    "swinv2_cr_giant, operations": (
        _giant,
        {"splits": ["stages.2.blocks.13", "stages.2.blocks.27"], "granularity": "op"},
    ),
}


def page_of(name: str) -> tuple[int, str]:
    """How many nodes a case's training graph has, and its page; on meta tensors where no inputs are given."""
    make, options = CASES[name]
    with torch.device("cpu" if "example_inputs" in options else "meta"):
        model = make()
    diff = fxcollab.diff(fxcollab.transform(model, seed=0, **options))
    return len(diff.nodes), to_html(diff.scene())


def measure(browser: Any, name: str, file: Path, axe: str, pictures: Path | None) -> list[dict[str, Any]]:
    """A line of the results for each size of the window."""
    nodes, text = page_of(name)
    file.write_text(text, encoding="utf-8")
    same = page_of(name)[1] == text
    facts = {"network": name, "nodes": nodes, "bytes": len(text.encode()), "same bytes twice": same}
    rows = []
    for (width, height), scheme in zip(SIZES, ("light", "dark", "light", "dark"), strict=True):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        start = time.perf_counter()
        page.goto(f"file://{file}")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        first = time.perf_counter() - start
        row = facts | {"width": width, "first view, s": round(first, 2)} | measured(page) | {"messages": len(said)}
        if axe:
            page.evaluate(f"{axe};0")
            row["axe violations"] = page.evaluate("axe.run().then(({ violations }) => violations.length)")
        if pictures:
            page.screenshot(path=pictures / f"{name.replace(' ', '-')}-{width}.png")
        openings = page.evaluate(_OPEN_EACH)
        rows.append(row | {"slowest opening, s": round(max(openings, default=0.0) / 1000, 3)})
        context.close()
    return rows


_OPEN_EACH = """() => plan.rows.filter(Boolean).map((group) => {
    const start = performance.now();
    toggle(group, true);
    const taken = performance.now() - start;
    toggle(group, false);
    return taken;
})"""


def main() -> None:
    """Measure all cases, or those named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--pictures", type=Path, metavar="DIR")
    parser.add_argument("--axe", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no chromium (on Debian: apt-get install chromium)")
    axe = arguments.axe.read_text() if arguments.axe else ""
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        file = Path(folder) / "diff.html"
        rows = [row for name in arguments.names for row in measure(browser, name, file, axe, arguments.pictures)]
        version = browser.version
        browser.close()
    record = {
        "browser": f"Chromium {version}, headless",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    (arguments.results / "diff.json").write_text(json.dumps(record, indent=1) + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=260).print(table)


if __name__ == "__main__":
    main()
