"""Train any SOURCE by collaborative learning: ``python -m samples.train SOURCE --data NAME -o DIR``.

For example: ``python -m samples.train samples/networks/resnet_cifar.py:resnet20 --data fashion-mnist --rgb --splits
stage1,stage2 --epochs 10 -o runs/resnet20``.

Data sets: ``fashion-mnist`` (the files of Debian's package dataset-fashion-mnist, or those in ``--folder``),
``digits`` (scikit-learn's), any class of ``torchvision.datasets`` by its name, or ``folder`` (images in
``train/CLASS`` and ``val/CLASS``). Every epoch adds a line to ``DIR/metrics.jsonl``: the loss, and the test errors of
head 0, of every head and of their ensemble. A run that was killed goes on from its last whole epoch when the same
command is given again, to the same numbers. At the end ``DIR/weights.safetensors`` holds head 0 under the original's
names: the SOURCE loads it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

import fxcollab
from fxcollab.source import Source, parse_argument
from samples.training.data import data_set
from samples.training.evaluate import errors
from samples.training.recipe import Recipe
from samples.training.steps import simultaneous
from samples.training.trainer import Training, epochs

CONSOLE = Console(stderr=True)


def train(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="As for fxcollab transform.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Metrics, checkpoint and weights.")],
    data: Annotated[str, typer.Option(help="fashion-mnist, digits, folder, or a torchvision data set.")],
    folder: Annotated[Path, typer.Option(help="Where the data are, or are downloaded to.")] = Path("data"),
    rgb: Annotated[bool, typer.Option(help="Show grey images to a network of three channels.")] = False,
    model_arg: Annotated[list[str] | None, typer.Option(metavar="K=V", help="For the model's factory.")] = None,
    pattern: Annotated[
        str, typer.Option(help="multi-instance, simple, hierarchical, or none: one head.")
    ] = "hierarchical",
    splits: Annotated[str, typer.Option(metavar="A,B", help="Names, or auto.")] = "auto",
    heads: Annotated[int | None, typer.Option(help="Of simple and multi-instance.")] = None,
    beta: Annotated[float, typer.Option(help="Weight of the labels against the consensus.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of the consensus.")] = 2.0,
    smoothing: Annotated[float, typer.Option(help="Of the labels.")] = 0.0,
    epochs_: Annotated[int, typer.Option("--epochs", min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    learning_rate: Annotated[float, typer.Option()] = 0.1,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    bfloat16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train a model by several heads, and keep one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(epochs_, batch, learning_rate, weight_decay=weight_decay, bfloat16=bfloat16)
    images = data_set(data, folder, rgb=rgb)
    torch.manual_seed(seed)
    loaded = Source.parse(source, dict(map(parse_argument, model_arg or ()))).load()
    example = next(images.test(1))[0]
    model: nn.Module = loaded.model
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
    training = _training(model.to(device), recipe, beta if pattern != "none" else 1.0, temperature, smoothing)
    output.mkdir(parents=True, exist_ok=True)
    metrics = output / "metrics.jsonl"
    with _progress() as progress:
        bar = progress.add_task("training", total=recipe.epochs * images.steps(batch), loss="")
        started = time.perf_counter()
        advance = partial(progress.update, bar, advance=1)
        for epoch in epochs(
            training, images, recipe, seed, device=device, file=output / "run.pt", each_step=lambda _: advance()
        ):
            progress.update(bar, completed=epoch.number * images.steps(batch), loss=f"loss {epoch.loss:.3f}")
            found = errors(model, images.test(batch), device)
            _log(metrics, {**asdict(epoch), **asdict(found), "seconds": round(time.perf_counter() - started, 1)})
            CONSOLE.print(
                f"epoch {epoch.number}: loss {epoch.loss:.3f}, error of head 0 {found.heads[0]:.2%}, of the others "
                f"{', '.join(f'{e:.2%}' for e in found.heads[1:]) or 'none'}, of the ensemble {found.ensemble:.2%}"
            )
    inference = fxcollab.prune(model) if isinstance(model, fxcollab.CollabGraphModule) else model
    weights = output / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in inference.state_dict().items()}, weights)
    final = errors(inference, images.test(batch), device)
    print(json.dumps({"error": final.heads[0], "weights": str(weights), "metrics": str(metrics)}))


def _training(model: nn.Module, recipe: Recipe, beta: float, temperature: float, smoothing: float) -> Training:
    objective = fxcollab.CollaborativeLoss(beta, temperature, hard=nn.CrossEntropyLoss(label_smoothing=smoothing))

    def loss(outputs: Sequence[Tensor], labels: Tensor, images: Tensor) -> Tensor:
        total: Tensor = objective(outputs, labels)
        return total

    optimizer = recipe.optimizer(model.parameters())
    return Training((model,), simultaneous(model, loss, optimizer, recipe), (optimizer,))


def _log(file: Path, line: dict[str, object]) -> None:
    """Add a line; one of the same epoch, from before a kill, gives way."""
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [text for text in lines if json.loads(text)["number"] < line["number"]]
    file.write_text("\n".join([*kept, json.dumps(line)]) + "\n")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=CONSOLE,
    )


if __name__ == "__main__":
    typer.run(train)
