"""``fxcollab prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command import Force, Json
from ..console import err, print_json, working


def prune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What transform wrote.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The safetensors file to write.", show_default=False)
    ],
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="F", help="A safetensors checkpoint; default: DIR's own.")
    ] = None,
    head: Annotated[int, typer.Option("--head", metavar="K", help="The head to keep.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write one head's weights, by the original's names.

    Needs no model.
    """
    with working("pruning"):
        from fxcollab.io.artifact import load_head
        from fxcollab.io.weights import refuse_existing_file, write_state_dict

        refuse_existing_file(output, force)
        state = load_head(directory, head, weights=weights)
        write_state_dict(state, output, force=force)
    if json:
        print_json({"file": str(output), "head": head, "tensors": len(state)})
    err().print(f"wrote {output}: {len(state)} tensors of head {head}")
