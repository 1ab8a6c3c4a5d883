"""The paper's claims with many seeds: small networks that fit their data, at the scale ``power``.

The rows are those of the paper's tables and figure 3, and what it leaves open: more heads, the weight of the
consensus and its temperature, error beside cost over thirty head trees, and labels that are wrong in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from samples.paper.experiments import Experiment
from samples.paper.methods import (
    ALTERNATING,
    DISTILLED,
    FOUR_INSTANCES,
    HIERARCHICAL,
    RESCALED,
    SIMPLE,
    SIMULTANEOUS,
    SINGLE,
    SMOOTHED_MORE,
    TWO_INSTANCES,
    Method,
    Other,
    Tree,
)

STAGES = ("stage1", "stage2", "stage3")


def _scalings() -> Iterator[Method]:
    """Table 3 with more heads, split late, so that most of the network is a trunk that all heads pull at."""
    for heads in (4, 8, 16):
        for scaling, name in (("none", "no scaling"), ("loss", "loss scaling"), ("rescale", "rescaled")):
            yield Tree(f"{heads} heads, {name}", "simple", heads, scaling=scaling, splits=("stage2",))  # type: ignore[arg-type]


def _weights() -> Iterator[Method]:
    """Of the labels, and temperatures: those of the paper are 0.5 and 2."""
    for beta in (0.25, 0.5, 0.75):
        for temperature in (1.0, 2.0, 4.0):
            yield replace(RESCALED, name=f"beta {beta}, T = {temperature:g}", beta=beta, temperature=temperature)


def _trees() -> Iterator[Method]:
    """Thirty trees: instances, one split early to late, two and three splits, ladders; 2 to 16 heads."""
    for heads in (2, 4, 8):
        yield Tree(f"{heads} instances", "multi-instance", heads)
    for stage in STAGES:
        for heads in (2, 4, 8):
            yield Tree(f"{heads} heads at {stage}", "simple", heads, splits=(stage,))
    yield Tree("16 heads at stage1", "simple", 16, splits=("stage1",))
    yield Tree("16 heads at stage2", "simple", 16, splits=("stage2",))
    for pair in (STAGES[:2], STAGES[::2], STAGES[1:]):
        for fanouts in ((2, 2), (2, 4), (4, 2)):
            yield Tree(f"{fanouts} at {' '.join(pair)}", "hierarchical", splits=pair, fanouts=fanouts)
    for fanouts in ((2, 3), (3, 2)):
        yield Tree(f"{fanouts} at stage1 stage2", "hierarchical", splits=STAGES[:2], fanouts=fanouts)
    yield Tree("(2, 2, 2)", "hierarchical", splits=STAGES, fanouts=(2, 2, 2))
    for splits in (STAGES[:2], STAGES[::2], STAGES[1:], STAGES):
        yield Tree(f"ladder at {' '.join(splits)}", "ladder", splits=splits)


def _objectives() -> Iterator[Method]:
    """Of other papers, on the tree of `RESCALED`."""
    for name in ("mutual", "KDCL", "ONE"):
        yield Other(f"4 heads, {name}", "simple", 4, splits=("stage1",), objective=name)


def _fixed() -> Iterator[Method]:
    """Where labels stay wrong, networks can learn them by heart: what less weight of the labels does then."""
    yield from (SINGLE, SMOOTHED_MORE)
    for method in (TWO_INSTANCES, HIERARCHICAL):
        yield method
        yield replace(method, name=f"{method.name}, beta 0.25", beta=0.25)


CLAIMS = (
    SINGLE,
    SMOOTHED_MORE,
    DISTILLED,
    TWO_INSTANCES,
    FOUR_INSTANCES,
    SIMPLE,
    RESCALED,
    HIERARCHICAL,
)
POWER: Mapping[str, Experiment] = {
    "claims": Experiment("Error (%) with label noise", "claims", CLAIMS, noise=(0.0, 0.2, 0.4, 0.6, 0.8)),
    "updates": Experiment(
        "Alternating and simultaneous updates, T = 1 and 2",
        "updates",
        (SINGLE, ALTERNATING, SIMULTANEOUS, TWO_INSTANCES),
        noise=(0.0, 0.4),
    ),
    "scaling": Experiment(
        "What scaling the gradients is worth, by number of heads", "scaling", (SINGLE, *_scalings()), noise=(0.0, 0.4)
    ),
    "consensus": Experiment(
        "Weight and temperature of the consensus", "consensus", (SINGLE, *_weights()), (0.0, 0.4)
    ),
    "objectives": Experiment(
        "Objectives of other papers on one tree", "objectives", (SINGLE, RESCALED, *_objectives()), noise=(0.0, 0.4)
    ),
    "larger": Experiment("Larger images", "larger", (SINGLE, TWO_INSTANCES, SIMPLE, HIERARCHICAL), noise=(0.4,)),
    "trees": Experiment("Error beside the cost of a step, by head tree", "trees", (SINGLE, *_trees()), noise=(0.4,)),
    "fixed": Experiment(
        "Wrong labels that stay wrong, to the last epoch and stopped early", "fixed", tuple(_fixed()), noise=(0.4,)
    ),
}
