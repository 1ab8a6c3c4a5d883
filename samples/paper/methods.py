"""The rows of the paper's tables: how one network is trained, alone or by several heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import fxcollab
from samples.paper.networks import Network
from samples.training.recipe import Recipe
from samples.training.steps import Loss, alternating, outputs_of, simultaneous
from samples.training.trainer import Training


@dataclass(frozen=True)
class Method:
    """One way to train a network.

    Attributes:
        name: the row of the table.
        pattern: of the heads; None for the network by itself.
        heads: how many; None for the pattern's usual number.
        temperature: T.
        beta: weight of the labels; 1 for those alone.
        smoothing: of the labels.
        scaling: where heads meet: the rescale of equation 5, nothing, or 1/H times the loss instead (table 3).
        alternating: whether heads are updated one after the other (table 2).
        teachers: members of the ensemble that it is distilled from.
    """

    name: str
    pattern: str | None = None
    heads: int | None = None
    temperature: float = 2.0
    beta: float = 0.5
    smoothing: float = 0.0
    scaling: Literal["rescale", "none", "loss"] = "rescale"
    alternating: bool = False
    teachers: int = 0


@dataclass(frozen=True)
class Tree(Method):
    """Heads at splits of its own, in place of the network's usual ones.

    Attributes:
        splits: where.
        fanouts: branches at each.
    """

    splits: tuple[str, ...] = ()
    fanouts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Other(Tree):
    """Heads that learn from each other as another paper has it, with the weights of that paper.

    Attributes:
        objective: "mutual", "KDCL" or "ONE"; the last one's gate sees what the first split's module returns.
    """

    objective: str = ""


SINGLE = Method("single instance", beta=1)
SMOOTHED = Method("label smoothing (0.05)", beta=1, smoothing=0.05)
SMOOTHED_MORE = Method("label smoothing (0.1)", beta=1, smoothing=0.1)
TWO_INSTANCES = Method("2 instances", "multi-instance", 2)
FOUR_INSTANCES = Method("4 instances", "multi-instance", 4)
SIMPLE = Method("2 heads, simple", "simple", 2)
HIERARCHICAL = Method("4 heads, hierarchical", "hierarchical")
ALTERNATING = Method("2 instances, alternating, T = 1", "multi-instance", 2, temperature=1, alternating=True)
SIMULTANEOUS = Method("2 instances, T = 1", "multi-instance", 2, temperature=1)
NO_SCALING = Method("4 heads, simple, no scaling", "simple", 4, scaling="none")
LOSS_SCALING = Method("4 heads, simple, loss scaling", "simple", 4, scaling="loss")
RESCALED = Method("4 heads, simple", "simple", 4)
DISTILLED = Method("distilled from 2", teachers=2)


def training(
    method: Method,
    network: Network,
    build: Callable[[], nn.Module],
    recipe: Recipe,
    seed: int,
    teachers: Sequence[nn.Module] = (),
    device: torch.device | None = None,
) -> Training:
    """What to train, from first weights that depend on the seed alone: head 0's are those of the single instance.

    Args:
        method: the row.
        network: with the splits of its patterns.
        build: makes it.
        recipe: of the run.
        seed: of the run.
        teachers: trained networks to distil from.
        device: where to train.
    """
    torch.manual_seed(seed)
    if method.pattern is None:
        model = build().to(device)
        optimizer = recipe.optimizer(model.parameters())
        return Training(
            (model,), simultaneous(model, _loss(method, recipe, teachers), optimizer, recipe), (optimizer,)
        )
    tree = method if isinstance(method, Tree) else Tree("", splits=network.splits[method.pattern])
    model = fxcollab.transform(
        build,
        method.pattern,
        tree.splits,
        heads=method.heads,
        fanouts=tree.fanouts,
        seed=seed,
        rescale=method.scaling == "rescale",
    ).to(device)
    if isinstance(method, Other):
        return _other(method, model, recipe)
    if not method.alternating:
        optimizer = recipe.optimizer(model.parameters())
        return Training((model,), simultaneous(model, _loss(method, recipe), optimizer, recipe), (optimizer,))
    instances = [fxcollab.prune(model, head) for head in range(method.heads or 2)]  # over the same tensors
    optimizers = tuple(recipe.optimizer(instance.parameters()) for instance in instances)
    objective = fxcollab.CollaborativeLoss(method.beta, method.temperature)
    return Training((model, *instances), alternating(instances, objective, optimizers, recipe), optimizers)


def _other(method: Other, model: fxcollab.CollabGraphModule, recipe: Recipe) -> Training:
    seen: dict[str, Tensor] = {}
    if method.objective == "ONE":
        split, channels = model.get_submodule(method.splits[0]), model.get_parameter(f"{method.splits[0]}.0.weight")
        split.register_forward_hook(lambda module, inputs, output: seen.update(features=output))
        objective: fxcollab.Objective = fxcollab.ONELoss(len(channels), method.heads or 2)
    else:
        objective = {"mutual": fxcollab.MutualLoss, "KDCL": fxcollab.KDCLLoss}[method.objective]()
    optimizer = recipe.optimizer([*model.parameters(), *objective.parameters()])

    def loss(outputs: Sequence[object], labels: Tensor, images: Tensor) -> Tensor:
        total: Tensor = objective(outputs, labels, *seen.values())
        return total

    return Training((model, objective), simultaneous(model, loss, optimizer, recipe), (optimizer,))


def _loss(method: Method, recipe: Recipe, teachers: Sequence[nn.Module] = ()) -> Loss:
    hard = nn.CrossEntropyLoss(label_smoothing=method.smoothing)
    if method.teachers:
        return _distilled(fxcollab.DistillationLoss(method.beta, method.temperature, hard=hard), teachers, recipe)
    objective = fxcollab.CollaborativeLoss(method.beta, method.temperature, hard=hard)

    def loss(outputs: Sequence[object], labels: Tensor, images: Tensor) -> Tensor:
        total: Tensor = objective(outputs, labels)
        return total / len(outputs) if method.scaling == "loss" else total

    return loss


def _distilled(objective: fxcollab.DistillationLoss, teachers: Sequence[nn.Module], recipe: Recipe) -> Loss:
    def loss(outputs: Sequence[object], labels: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            taught = [outputs_of(teacher, images, recipe)[0] for teacher in teachers]
        total: Tensor = objective(outputs, labels, taught)
        return total

    return loss
