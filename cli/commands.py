"""The commands. Functions of the library are imported where they run: help and completion need none."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import Force, Json
from .console import CheckFailed, err, out, print_json, working
from .parsing import default_directory
from .planning import Options, option
from .render import levels_of, render_candidates, render_costs, render_report, render_summary

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import GraphModule

    from fxcollab.errors import FxCollabError

Directory = Annotated[Path | None, option("Where to write; default: NAME_collab.", "DIR", "-o", "--output")]
PrintPasses = Annotated[bool, option("Show the graph after every pass.", None, "--print-passes")]
Depth = Annotated[int | None, option("Open all modules N levels deep; default: those that do much work.", "N")]
Optimizer = Annotated[float, option("Values it holds for each trained one: 1 for momentum, 2 for Adam.", "N")]
Other = Annotated[str | None, typer.Argument(help="Another model or directory to compare with.", metavar="B")]
All = Annotated[bool, option("A line for every node: nothing is folded.", None, "--all")]
Evaluation = Annotated[bool, option("Eval mode's graphs, where they differ from train mode's.", None, "--eval")]
Prove = Annotated[bool, option("Verify, and show it on the page; exits with 1 if a check fails.", None, "--prove")]
Files = Annotated[
    list[Path] | None,
    option("A view, by ending: .html, .svg, .png, .json, .dot.", "FILE", "-o", "--output"),
]
Artifact = Annotated[Path, typer.Argument(help="A directory that transform wrote.", metavar="DIR")]
Weights = Annotated[Path, option("The safetensors file to write.", "OUT", "-o", "--output")]
Checkpoint = Annotated[Path | None, option("A safetensors checkpoint; default: DIR's own.", "F", "--weights")]
Head = Annotated[int, option("The head to keep.", "K")]


def transform(
    options: Options,
    output: Directory = None,
    print_passes: PrintPasses = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make the training graph of a model.

    It is written to a directory, and summed up. Given a directory that transform wrote, transform makes another graph
    of the model in its plan, with the plan's options where no others are given; weights start anew.
    """
    shown = output or default_directory(options.source)
    directory = shown.absolute()  # the user's code may change the working directory
    from fxcollab.costs.original import profile_original
    from fxcollab.costs.summary import summarise
    from fxcollab.diffs.build import diff
    from fxcollab.diffs.html import to_html
    from fxcollab.io.artifact import save
    from fxcollab.io.files import refuse_existing

    refuse_existing(directory, force)
    options, loaded = options.load()
    choice = options.choose(loaded)
    passes: list[str] = []

    def show(name: str, graph_module: GraphModule) -> None:
        passes.append(f"{name}: {graph_module.graph}\n" + (levels_of(graph_module) if name == "partition" else ""))

    try:
        train_model = options.transform(loaded, choice, after_pass=show if print_passes else None, force=force)
    finally:  # also where a pass fails
        for text in passes:
            (err() if json else out()).print(text)
    with working(f"writing {shown}"):
        counted = profile_original(train_model)
        summary = summarise(train_model, counted)
        save(train_model, directory, force=force, page=to_html(diff(train_model, counted=counted).scene()))
    if json:
        print_json({"directory": str(shown), **({"choice": choice.to_json()} if choice else {}), **summary.to_json()})
    else:
        render_summary(summary, choice)
    err().print(f"wrote {shown}/, to be loaded by fxcollab.load({str(shown)!r})")


def splits(options: Options, depth: Depth = None, json: Json = False) -> None:
    """List where a model can be split, and what lies before it.

    A split is a point at which one value, or a few, carry all that learns. Shares are those of a forward's
    operations and of the memory kept for the backward; what lies behind a split is what every branch repeats. Where a
    stage ends, the value's resolution changes.
    """
    options.refuse_with_directory(but=("granularity",))
    options, loaded = options.load()
    with working("counting"):
        import fxcollab

        found = fxcollab.find_splits(loaded.model, **options.arguments(fxcollab.find_splits), depth=depth)
    if json:
        print_json([asdict(candidate) | {"share": candidate.share} for candidate in found])
    else:
        render_candidates(found, guessed=not options.input)


def costs(options: Options, optimizer: Optimizer = 1.0, json: Json = False) -> None:
    """Say what training will cost, before anything is built.

    The costs are those of a training step, of the original and of the training graph.
    """
    options.refuse_with_directory()
    options, loaded = options.load()
    choice = options.choose(loaded, optimizer=optimizer)
    with working("counting"):
        import fxcollab

        if choice:
            found = choice.costs
        else:
            arguments = options.arguments(fxcollab.training_costs)
            found = fxcollab.training_costs(loaded.model, **arguments, optimizer=optimizer)
    if json:
        print_json(({"choice": choice.to_json()} if choice else {}) | found.to_json())
    else:
        render_costs(found, choice, guessed=not options.input)


def diff(
    options: Options,
    other: Other = None,
    unfolded: All = False,
    evaluation: Evaluation = False,
    output: Files = None,
    prove: Prove = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Show training beside inference graph, or any two graphs.

    Nodes are shared, cloned or inserted; of two graphs, added, removed, changed or rewired. A directory's plan names
    code that is run: unasked only your own, and models of torchvision and timm.
    """
    from fxcollab.diffs.build import diff as difference
    from fxcollab.diffs.compare import Comparison
    from fxcollab.diffs.compare_views import view as view_of_two
    from fxcollab.diffs.terminal import view
    from fxcollab.diffs.views import refuse_unwritable
    from fxcollab.errors import DiffError

    files = output or []
    if twice := next((file for file, count in Counter(map(Path.absolute, files)).items() if count > 1), None):
        raise DiffError("An output is given twice.", where=str(twice), hint="name each file once")
    for file in files:
        refuse_unwritable(file, force)
    train_model = options.training_model(but=("model_arg",) if other else ())
    second = _model_of(replace(options, source=other)) if other else None
    with working("comparing"):
        found = difference(train_model, second, training=not evaluation)
    if isinstance(found, Comparison) and prove:
        raise _for_one_graph()
    report = options.verify(train_model) if prove else None
    with working("drawing"):
        for file in files:
            if isinstance(found, Comparison):
                found.save(file, force=force)
            else:
                found.save(file, report, force=force)
            err().print(f"wrote {file}")
    if json:
        typer.echo(found.to_json())
    elif not files:
        view_it = partial(view_of_two, found) if isinstance(found, Comparison) else partial(view, found)
        out().print(view_it(unfolded=unfolded), soft_wrap=False)
    if report is not None and not report.ok:
        err().print("the proof failed: see fxcollab verify")
        raise CheckFailed


def _for_one_graph() -> FxCollabError:
    from fxcollab.errors import DiffError

    return DiffError(
        "--prove is for a training graph beside its inference graph.",
        why="these are two graphs of which the second is not the first one's inference graph",
        hint="leave it out, or leave out the second",
    )


def _model_of(options: Options) -> nn.Module:
    return options.training_model(but=options.given) if options.is_directory else options.load()[1].model


def verify(options: Options, json: Json = False) -> None:
    """Prove that a training graph is right.

    It trains the model as promised, and gives it back exactly. Exits with 1 if any check fails. A directory's plan
    names code that is run: unasked only your own, and models of torchvision and timm.
    """
    report = options.verify(options.training_model())
    if json:
        print_json({"ok": report.ok, **asdict(report)})
    else:
        render_report(report)
    if not report.ok:
        raise CheckFailed


def prune(
    directory: Artifact,
    output: Weights,
    weights: Checkpoint = None,
    head: Head = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write one head's weights, by the original's names.

    Needs no model.
    """
    with working("pruning"):
        from fxcollab.io.artifact import load_head
        from fxcollab.io.weights import refuse_unwritable, write_state_dict

        refuse_unwritable(output, force)
        state = load_head(directory, head, weights=weights)
        write_state_dict(state, output, force=force)
    if json:
        print_json({"file": str(output), "head": head, "tensors": len(state)})
    kind = "" if output.suffix == ".safetensors" else ", in the format of safetensors"
    err().print(f"wrote {output}: {len(state)} tensors of head {head}{kind}")
