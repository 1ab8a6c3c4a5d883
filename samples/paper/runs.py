"""One run: a network trained by one method from one seed, and what came out."""

from __future__ import annotations

import platform
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxcollab
from samples.paper.methods import SINGLE, Method, training
from samples.paper.networks import NETWORKS
from samples.paper.scales import Setting, data_of
from samples.training.data import DataSet
from samples.training.evaluate import errors
from samples.training.trainer import Epoch, Kept, epochs

Row = dict[str, Any]
HISTOGRAM = (-0.5, 0.5, 200)  # of a layer's weights: from, to, bins


@dataclass(frozen=True)
class Run:
    """What identifies a run.

    Attributes:
        setting: data, network and recipe.
        method: the row of the table.
        noise: the share of corrupted labels.
        seed: all that is random depends on it.
    """

    setting: Setting
    method: Method
    noise: float
    seed: int

    @property
    def key(self) -> str:
        """Names the run in files: the method's options count, not only its name."""
        setting = self.setting
        parts = setting.data, setting.network, setting.recipe, self.method, f"noise {self.noise}", f"seed {self.seed}"
        held_out = (f"{setting.held_out} held out",) if setting.held_out else ()
        return " | ".join(map(str, (*parts, *held_out)))


def carry_out(run: Run, folder: Path, checkpoints: Path | None) -> Row:
    """Train, prune to head 0, and evaluate after the last epoch.

    Where samples are held out, the epoch with the fewest errors on them is evaluated too.

    Args:
        run: what to do.
        folder: where data sets are.
        checkpoints: where unfinished runs are kept, to go on from; None for nowhere.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, held_out = data_of(run.setting, folder, run.noise)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stops: list[Row] = []

    def look(model: nn.Module) -> None:
        if held_out:
            chosen = errors(model, held_out.test(500), device).heads[0]
            stops.append({"epoch": len(stops) + 1, "held out": chosen, **_errors(model, data, device)})

    # What was seen of the epochs is no part of a checkpoint.
    model, epochs = _trained(run, data, None if held_out else checkpoints, device, look)
    inference = fxcollab.prune(model) if isinstance(model, fxcollab.CollabGraphModule) else model
    kept = errors(inference, data.test(500), device)
    return {
        "key": run.key,
        "data": run.setting.data,
        "network": run.setting.network,
        "recipe": asdict(run.setting.recipe),
        "method": run.method.name,
        "noise": run.noise,
        "seed": run.seed,
        **_errors(model, data, device),
        "error": kept.heads[0],
        "top5 error": kept.top5,
        "stopped": min(stops, key=lambda stop: stop["held out"]) if held_out else None,
        "loss": epochs[-1].loss,
        "seconds": epochs[-1].seconds,
        "memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "weights": dict(_weights(inference)) if run.setting.noise is None and run.setting.seeds < 20 else None,
        "torch": torch.__version__,
        "fxcollab": fxcollab.__version__,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
    }


def _errors(model: nn.Module, data: DataSet, device: torch.device) -> Row:
    """Of head 0, of all heads and of their ensemble, on the test set."""
    found = errors(model, data.test(500), device)
    return {
        "error": found.heads[0],
        "errors of heads": found.heads,
        "error of the ensemble": found.ensemble,
        "disagreement": found.disagreement,
    }


def _cpu() -> str:
    """The kind of CPU, as far as torch's kernels differ by it."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def one_thread() -> None:
    """For each of several processes that carry out runs beside one another."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def checkpoint_of(run: Run, folder: Path) -> Path:
    """Where a run that is not finished is kept."""
    return folder / f"{zlib.crc32(run.key.encode()):08x}.pt"


def _trained(
    run: Run,
    data: DataSet,
    checkpoints: Path | None,
    device: torch.device,
    look: Callable[[nn.Module], None] = lambda model: None,
) -> tuple[nn.Module, Sequence[Epoch]]:
    """The model, which ``look`` sees after every epoch, and what those gave; seconds count those of its teachers."""
    network, recipe = NETWORKS[run.setting.network], run.setting.recipe
    build = partial(network.make, num_classes=data.classes)
    taught = [
        _trained(Run(run.setting, SINGLE, run.noise, 1000 * (member + 1) + run.seed), data, checkpoints, device)
        for member in range(run.method.teachers)
    ]
    teachers = [teacher.eval() for teacher, _ in taught]
    started = training(run.method, network, build, recipe, run.seed, teachers, device)
    kept = Kept(checkpoint_of(run, checkpoints), {"run": run.key}) if checkpoints else None
    before: list[Epoch] = []
    found = []
    for epoch in epochs(started, data, recipe, run.seed, device=device, kept=kept, before=before.append):
        look(started.modules[0])
        found.append(epoch)
    earlier = sum(history[-1].seconds for _, history in taught)
    return started.modules[0], [replace(epoch, seconds=epoch.seconds + earlier) for epoch in (*before, *found)]


def _weights(model: nn.Module) -> Iterator[tuple[str, Row]]:
    """Deviation and histogram of every layer's weights, in the order of the network (figure 4)."""
    low, high, bins = HISTOGRAM
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach().float().cpu()
            counts = torch.histc(weight.clamp(low, high), bins, low, high)  # what lies outside is in the last bins
            yield name, {"std": weight.std().item(), "histogram": counts.int().tolist()}
