"""``fxcollab prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxcollab_cli import options
from fxcollab_cli.console import err, print_json, working


def prune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What transform wrote.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The safetensors file to write.", show_default=False)
    ],
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="F", help="A safetensors checkpoint; default: DIR's own.")
    ] = None,
    head: Annotated[int, typer.Option("--head", metavar="K", help="The head to keep.")] = 0,
    force: options.Force = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write the weights of one head under the original model's names. Needs no model."""
    with working("pruning"):
        from fxcollab.artifact import WEIGHTS, load_state_dict, read_plan, write_state_dict
        from fxcollab.state_dict import prune_state_dict

        plan = read_plan(directory)
        plan.tree.head_path(head)
        state = prune_state_dict(load_state_dict(weights or directory / WEIGHTS), head, peers=plan.peers)
        write_state_dict(state, output, force=force)
    if json:
        print_json({"file": str(output), "head": head, "tensors": len(state)})
    err().print(f"wrote {output}: {len(state)} tensors of head {head}")
