"""The API reference as pages, from the docstrings: pdoc's, with what is public and nothing else.

python -m samples.guides.api -o api    # needs the extra ``reference``
"""

from __future__ import annotations

import argparse
import inspect
import types
from pathlib import Path

import pdoc

import fxcollab

MODULES = ("fxcollab", "fxcollab.passes", "fxcollab.integrations.lightning", "fxcollab.integrations.transformers")


def main(folder: Path) -> list[Path]:
    """Write the pages of `MODULES`; returns them."""
    pdoc.render.configure(docformat="google", footer_text=f"fxcollab {fxcollab.__version__}", search=True)
    pdoc.pdoc(*MODULES, output_directory=folder)
    return sorted(folder.rglob("*.html"))


def public() -> dict[str, object]:
    """Functions and classes that the reference shows, by their full names."""
    found: dict[str, object] = {f"fxcollab.{name}": getattr(fxcollab, name) for name in fxcollab.__all__}
    for name in MODULES[1:]:
        module = __import__(name, fromlist=["_"])
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        found |= {
            f"{name}.{key}": value
            for key, value in own.items()
            if isinstance(value, (type, types.FunctionType)) and inspect.getmodule(value) is module
        }
    return {name: value for name, value in found.items() if callable(value)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("api"))
    for page in main(parser.parse_args().output):
        print(page)
