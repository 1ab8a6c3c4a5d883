"""Train any SOURCE by collaborative learning: ``python -m samples.train SOURCE --data NAME -o DIR``.

For example: ``python -m samples.train samples/networks/resnet_cifar.py:resnet20 --data fashion-mnist --rgb --splits
stage1,stage2 --epochs 10 -o runs/resnet20``.

Data sets: ``fashion-mnist`` (the files of Debian's package dataset-fashion-mnist, or those in ``--folder``),
``digits`` (scikit-learn's), a class of ``torchvision.datasets`` that has a part to train and one to test on (CIFAR10,
SVHN, Flowers102, ...), or ``folder`` (images in ``train/CLASS`` and ``val/CLASS``). Every epoch adds a line to
``DIR/metrics.jsonl``: the loss, and the test errors of head 0, of every head and of their ensemble. A run that was
killed goes on from its last whole epoch when the same command is given again, to the same numbers; with other options
it is refused. At the end ``DIR/weights.safetensors`` holds head 0 under the original's names: the SOURCE loads it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fxcollab
from fxcollab.io.files import refuse_existing_file
from fxcollab.io.recognise import is_head
from fxcollab.io.weights import write_state_dict
from fxcollab.objectives.outputs import logits_of_heads
from fxcollab.sources.load import load
from fxcollab.sources.source import Source, parse_argument
from samples.training.data import DataSet, data_set
from samples.training.evaluate import Errors, errors
from samples.training.lines import read, write
from samples.training.recipe import Recipe
from samples.training.steps import Loss, outputs_of, simultaneous
from samples.training.trainer import Epoch, Kept, Training, epochs

CONSOLE = Console(stderr=True)
_COLUMNS = {field.name for field in (*fields(Epoch), *fields(Errors))}  # of the metrics


def train(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="As for fxcollab transform.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Metrics, checkpoint and weights.")],
    data: Annotated[str, typer.Option(help="fashion-mnist, digits, folder, or a torchvision data set.")],
    folder: Annotated[Path, typer.Option(help="Where the data are, or are downloaded to.")] = Path("data"),
    rgb: Annotated[bool, typer.Option(help="Show grey images to a network of three channels.")] = False,
    size: Annotated[int | None, typer.Option(help="Resize images to N x N.", min=1)] = None,
    noise: Annotated[float, typer.Option(help="Share of the training labels that are wrong, in every epoch.")] = 0.0,
    model_arg: Annotated[list[str] | None, typer.Option(metavar="K=V", help="For the model's factory.")] = None,
    pattern: Annotated[
        str, typer.Option(help="multi-instance, simple, hierarchical, ladder, or none: one head.")
    ] = "hierarchical",
    splits: Annotated[str, typer.Option(metavar="A,B", help="Names, or auto.")] = "auto",
    heads: Annotated[int | None, typer.Option(help="Of simple and multi-instance.")] = None,
    objective: Annotated[str, typer.Option(help="collaborative, mutual or kdcl.")] = "collaborative",
    beta: Annotated[
        float | None, typer.Option(help="Weight of the labels; collaborative's, 0.5 unless said.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the consensus, 2 unless said.")] = None,
    smoothing: Annotated[float, typer.Option(help="Of the labels.")] = 0.0,
    epochs_: Annotated[int, typer.Option("--epochs", min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    learning_rate: Annotated[float, typer.Option()] = 0.1,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    bfloat16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train a model by several heads, and keep one."""
    _refuse_idle(pattern, splits, heads, objective, beta, temperature)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(epochs_, batch, learning_rate, weight_decay=weight_decay, bfloat16=bfloat16)
    images = data_set(data, folder, rgb, size, noise)
    torch.manual_seed(seed)
    loaded = load(Source.parse(source, dict(map(parse_argument, model_arg or ()))))
    example = next(images.test(2))[0]  # of one, BatchNorm in train mode has no variance
    model: nn.Module = loaded.model
    _check(model, example, images)
    if pattern != "none":
        model = fxcollab.transform(
            loaded.model,
            pattern,  # type: ignore[arg-type]  # refused there if unknown
            splits if pattern != "multi-instance" else (),
            heads,
            example_inputs=(example,),
            seed=seed,
            factory=loaded.factory,
        )
        summary = fxcollab.summarise(model)
        CONSOLE.print(
            f"{summary.heads} heads, {pattern}; parameters {summary.parameters[0]:,} -> {summary.parameters[1]:,}"
        )
    loss = _objective(objective if pattern != "none" else "labels", beta, temperature or 2.0, smoothing)
    optimizer = recipe.optimizer(model.to(device).parameters())
    training = Training((model,), simultaneous(model, _of_outputs(loss), optimizer, recipe), (optimizer,))
    identity = {
        "SOURCE": source, "--model-arg": model_arg or [], "--data": data, "--folder": str(folder.resolve()),
        "--rgb": rgb, "--size": size, "--noise": noise, "--pattern": pattern, "--splits": splits, "--heads": heads,
        "--seed": seed,
        "--objective": objective, "--beta": beta, "--temperature": temperature, "--smoothing": smoothing,
        "the recipe": str(recipe),
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    metrics, kept, weights = (
        output / "metrics.jsonl",
        Kept(output / "run.pt", identity),
        output / "weights.safetensors",
    )
    if not _are_ours(metrics):
        raise ValueError(f"{metrics} was not written by this script: give another -o")
    if weights.exists() and not metrics.exists():
        raise ValueError(f"{weights} was not written by this script, of which no run was here: give another -o")
    refuse_existing_file(weights, True, is_head)
    with _progress() as progress:
        bar = progress.add_task("training", total=recipe.epochs * images.steps(batch), loss="")
        advance = partial(progress.update, bar, advance=1)
        for epoch in epochs(training, images, recipe, seed, device=device, kept=kept, each_step=lambda _: advance()):
            progress.update(bar, completed=epoch.number * images.steps(batch), loss=f"loss {epoch.loss:.3f}")
            found = errors(model, images.test(batch), device)
            _log(metrics, {**asdict(epoch), **asdict(found)})
            CONSOLE.print(
                f"epoch {epoch.number}: loss {epoch.loss:.3f}, error of head 0 {found.heads[0]:.2%}, of the others "
                f"{', '.join(f'{e:.2%}' for e in found.heads[1:]) or 'none'}, of the ensemble {found.ensemble:.2%}"
            )
    inference = fxcollab.prune(model) if isinstance(model, fxcollab.CollabGraphModule) else model
    write_state_dict(inference.state_dict(), weights, force=True)
    final = errors(inference, images.test(batch), device)
    print(json.dumps({"error": final.heads[0], "weights": str(weights), "metrics": str(metrics)}))


def _refuse_idle(
    pattern: str, splits: str, heads: int | None, objective: str, beta: float | None, temperature: float | None
) -> None:
    """Refuse an unknown objective, and options that would change nothing."""
    if objective not in ("collaborative", "mutual", "kdcl"):
        raise ValueError(f"no objective {objective!r}: it is collaborative, mutual or kdcl")
    if objective != "collaborative" and beta is not None:
        raise ValueError(f"--objective {objective} has no beta: leave --beta out")
    if pattern == "none":
        said = {"--splits": splits != "auto", "--heads": heads, "--objective": objective != "collaborative"}
        said |= {"--beta": beta is not None, "--temperature": temperature is not None}
        if idle := [name for name, given in said.items() if given]:
            raise ValueError(f"--pattern none trains one head on the labels alone: leave {', '.join(idle)} out")


def _objective(name: str, beta: float | None, temperature: float, smoothing: float) -> fxcollab.Objective:
    if not 0 <= smoothing <= 1:
        raise ValueError(f"--smoothing is a share of the labels, from 0 to 1, not {smoothing}")
    hard = nn.CrossEntropyLoss(label_smoothing=smoothing)
    if name in ("collaborative", "labels"):
        weight = 1.0 if name == "labels" else 0.5 if beta is None else beta
        return fxcollab.CollaborativeLoss(weight, temperature, hard=hard)
    if name == "mutual":
        return fxcollab.MutualLoss(temperature, hard=hard)
    return fxcollab.KDCLLoss(temperature=temperature, hard=hard)


def _of_outputs(objective: fxcollab.Objective) -> Loss:
    def loss(outputs: Sequence[object], labels: Tensor, images: Tensor) -> Tensor:
        total: Tensor = objective(outputs, labels)
        return total

    return loss


def _check(model: nn.Module, example: Tensor, data: DataSet) -> None:
    """Refuse a network that doesn't take the images or know all classes, before it is trained."""
    model.eval()
    shape = "x".join(map(str, example.shape))
    try:
        with torch.no_grad():
            [logits] = logits_of_heads(outputs_of(model, example), "logits")
    except (RuntimeError, ValueError, TypeError) as error:  # whatever a network raises on images of another shape
        raise ValueError(
            f"the network fails on images {shape}: {error}; try --rgb, --size 32 or --size 224"
        ) from error
    if logits.dim() != 2:
        raise ValueError(f"the network gives {tuple(logits.shape)} for images {shape}, not one logit a class")
    if data.classes is not None and logits.shape[1] < data.classes:
        raise ValueError(
            f"the network tells {logits.shape[1]} classes apart, the data have {data.classes}: "
            f"--model-arg num_classes={data.classes}, or as the factory calls it"
        )


def _log(file: Path, line: dict[str, Any]) -> None:
    """Add a line; those of this epoch and later ones, from before a kill, give way."""
    write(file, [*(row for row in read(file) if row["number"] < line["number"]), line])


def _are_ours(file: Path) -> bool:
    """Whether a file has metrics that this script wrote, or there is none."""
    if not file.exists():
        return True
    try:
        rows = read(file)
    except ValueError:  # no text, or no JSON
        return False
    return bool(rows) and all(isinstance(row, dict) and row.keys() == _COLUMNS for row in rows)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=CONSOLE,
    )


if __name__ == "__main__":
    try:
        typer.run(train)
    except (fxcollab.FxCollabError, ValueError) as error:
        sys.exit(str(error))
