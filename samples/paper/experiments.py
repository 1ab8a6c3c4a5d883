"""Which runs every table and figure of the paper takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from samples.paper.methods import (
    ALTERNATING,
    DISTILLED,
    FOUR_INSTANCES,
    HIERARCHICAL,
    LOSS_SCALING,
    NO_SCALING,
    RESCALED,
    SIMPLE,
    SIMULTANEOUS,
    SINGLE,
    SMOOTHED,
    SMOOTHED_MORE,
    TWO_INSTANCES,
    Method,
)
from samples.paper.runs import Run
from samples.paper.scales import SCALES, Role


@dataclass(frozen=True)
class Experiment:
    """A table or a figure.

    Attributes:
        title: as the paper's caption has it.
        role: the data set on which the paper ran it.
        methods: its rows.
        noise: levels of label noise.
        first_network: whether the paper ran it on the first network alone.
        paper: the paper's figures in percent, by network and method, for comparison.
    """

    title: str
    role: Role
    methods: tuple[Method, ...]
    noise: tuple[float, ...] = (0.0,)
    first_network: bool = False
    paper: Mapping[str, Mapping[str, str]] | None = None

    def runs(self, scale: str) -> Iterator[Run]:
        """All runs at a scale, seed by seed, so that an interrupted series is balanced."""
        settings = SCALES[scale].get(self.role, ())
        for setting in settings[:1] if self.first_network else settings:
            for seed in range(setting.seeds):
                for noise in (level for level in self.noise if setting.noise is None or level in setting.noise):
                    for method in self.methods:
                        yield Run(setting, method, noise, seed)


_COLLABORATIVE = (TWO_INSTANCES, SIMPLE, HIERARCHICAL)
EXPERIMENTS: Mapping[str, Experiment] = {
    "table1": Experiment(
        "Test errors (%) by head pattern",
        "CIFAR-10",
        (SINGLE, SMOOTHED, *_COLLABORATIVE, FOUR_INSTANCES),
        paper={
            "ResNet-32": {
                SINGLE.name: "6.66 ± 0.21",
                SMOOTHED.name: "6.83 ± 0.14",
                TWO_INSTANCES.name: "6.19 ± 0.17",
                FOUR_INSTANCES.name: "6.16 ± 0.17",
                SIMPLE.name: "5.97 ± 0.07",
                HIERARCHICAL.name: "5.86 ± 0.13",
            },
            "ResNet-110": {
                SINGLE.name: "5.56 ± 0.16",
                SMOOTHED.name: "5.66 ± 0.08",
                TWO_INSTANCES.name: "5.21 ± 0.14",
                FOUR_INSTANCES.name: "5.16 ± 0.13",
                SIMPLE.name: "5.15 ± 0.14",
                HIERARCHICAL.name: "4.98 ± 0.12",
            },
            "DenseNet-40-12": {
                SINGLE.name: "5.26 ± 0.08",
                SMOOTHED.name: "5.40 ± 0.04",
                TWO_INSTANCES.name: "5.11 ± 0.15",
                FOUR_INSTANCES.name: "5.00 ± 0.05",
                SIMPLE.name: "5.04 ± 0.10",
                HIERARCHICAL.name: "4.86 ± 0.12",
            },
        },
    ),
    "table2": Experiment(
        "Alternating against simultaneous updates, errors (%) of both heads",
        "CIFAR-100",
        (SINGLE, ALTERNATING, SIMULTANEOUS, TWO_INSTANCES),
        paper={
            "ResNet-32": {
                SINGLE.name: "30.52 ± 0.35",
                ALTERNATING.name: "28.81",
                SIMULTANEOUS.name: "27.48 ± 0.37",
                TWO_INSTANCES.name: "26.36 ± 0.27",
            }
        },
    ),
    "table3": Experiment(
        "Impact of backpropagation rescaling, test errors (%)",
        "CIFAR-10",
        (NO_SCALING, LOSS_SCALING, RESCALED),
        first_network=True,
        paper={
            "ResNet-32": {
                NO_SCALING.name: "6.04 ± 0.17",
                LOSS_SCALING.name: "6.09 ± 0.24",
                RESCALED.name: "5.82 ± 0.08",
            }
        },
    ),
    "table4": Experiment(
        "Errors (%) beside the cost of training",
        "ImageNet",
        (SINGLE, SMOOTHED_MORE, DISTILLED, *_COLLABORATIVE),
        paper={
            "ResNet-50": {
                SINGLE.name: "23.47",
                SMOOTHED_MORE.name: "23.34",
                DISTILLED.name: "22.65",
                TWO_INSTANCES.name: "22.81",
                SIMPLE.name: "22.70",
                HIERARCHICAL.name: "22.29",
            }
        },
    ),
    "figure3": Experiment(
        "Test error (%) with label noise",
        "CIFAR-10",
        (SINGLE, *_COLLABORATIVE),
        noise=(0.0, 0.2, 0.4, 0.6),
        first_network=True,
    ),
    "figure4": Experiment("Distribution of every layer's weights", "ImageNet", (SINGLE, DISTILLED, HIERARCHICAL)),
}
