"""Fine-tuning: a ResNet-18 that knows the digits 0 to 4 learns 5 to 9, all heads from what it knows.

python -m samples.integrations.fine_tuning      # about five minutes on two cores
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import fxcollab
from samples.training.in_memory import digits

EPOCHS, BATCH, FEW = 4, 32, 160
WAYS = ("plain", "finetune", "finetune, from a factory", "finetune, stages frozen", "fresh")


def images_of(first: int, count: int | None = None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images (N, 3, 16, 16) of five digits from ``first`` on, and their classes 0 to 4."""
    data = digits()
    pairs = []
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        chosen = (labels >= first) & (labels < first + 5)
        scaled = nn.functional.interpolate(images[chosen].float() / 128 - 1, scale_factor=2)
        pairs.append((scaled.expand(-1, 3, -1, -1), labels[chosen] - first))
    (x, y), test = pairs
    return (x[:count], y[:count]), test


def fit(model: nn.Module, loss: Callable[[object, Tensor], Tensor], data: tuple[Tensor, Tensor], rate: float) -> None:
    """Train what isn't frozen for some epochs."""
    x, y = data
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, 0.9)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(model(x[index]), y[index]).backward()
            optimizer.step()


def trained() -> nn.Module:
    """A network that knows 0 to 4, with a new last layer for 5 to 9."""
    torch.manual_seed(0)
    network = resnet18(num_classes=5)
    fit(network, nn.functional.cross_entropy, images_of(0)[0], 0.02)
    network.fc = nn.Linear(512, 5)
    return network


def equal_tensors(train_model: fxcollab.CollabGraphModule, network: nn.Module) -> Iterator[tuple[int, int]]:
    """For every head, how many tensors of its state are the network's, and of how many."""
    own = network.state_dict()
    for head in range(4):
        state = fxcollab.prune(train_model, head).state_dict()
        yield sum(torch.equal(state[name], own[name]) for name in own), len(own)


def tune(way: str, network: nn.Module, seed: int = 0) -> tuple[list[str], float]:
    """What heads start with, and the error of head 0 after some epochs."""
    network = copy.deepcopy(network)
    data, (test, labels) = images_of(5, FEW)
    if "frozen" in way:
        for stage in (network.conv1, network.bn1, network.layer1, network.layer2):
            stage.requires_grad_(False)
    if way == "plain":
        fit(network, nn.functional.cross_entropy, data, 0.01)
        starts: list[str] = []
    else:
        factory = (lambda: resnet18(num_classes=5)) if "factory" in way else None
        with warnings.catch_warnings():
            warnings.simplefilter("error" if way != "fresh" else "ignore")  # a fresh start of a trained model warns
            train_model = fxcollab.transform(
                network,
                splits=["layer2", "layer3"],
                init="fresh" if way == "fresh" else "finetune",
                factory=factory,
                seed=seed,
            )
        starts = [f"{same} of {of}" for same, of in equal_tensors(train_model, network)]
        fit(train_model, fxcollab.CollaborativeLoss(), data, 0.01)
    with torch.no_grad():
        return starts, float((network.eval()(test).argmax(1) != labels).float().mean())


def main(seeds: int = 3) -> dict[str, tuple[list[str], list[float]]]:
    """Every way, from the same trained network."""
    network, found = trained(), {}
    for way in WAYS:
        results = [tune(way, network, seed) for seed in range(seeds)]
        found[way] = results[0][0], [error for _, error in results]
    return found


if __name__ == "__main__":
    for way, (starts, errors) in main().items():
        mean = sum(errors) / len(errors)
        given = f"tensors as given, by head: {', '.join(starts)}" if starts else "one network"
        print(f"{way:26} error {mean:.1%} ({', '.join(f'{error:.1%}' for error in errors)})   {given}")
