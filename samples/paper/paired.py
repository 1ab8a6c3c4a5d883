"""Differences between methods, paired by seed: their intervals, and corrections for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import ttest_rel

from samples.paper.runs import Row

LEVEL = 0.05


@dataclass(frozen=True)
class Gain:
    """By how much the error of one method is lower than that of another, in percentage points.

    Attributes:
        mean: over the seeds that both have.
        low, high: the 95 % interval of the mean, by Student's t.
        t: of the paired test.
        p: its two-sided probability under no difference.
        seeds: how many.
    """

    mean: float
    low: float
    high: float
    t: float
    p: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def gain(runs: Sequence[Row], base: Sequence[Row]) -> Gain | None:
    """The gain of ``runs`` over ``base``; None with fewer than two seeds in common, or where all errors are equal."""
    before = {row["seed"]: 100 * row["error"] for row in base}
    after = {row["seed"]: 100 * row["error"] for row in runs if row["seed"] in before}
    pairs = [(before[seed], error) for seed, error in after.items()]
    if len(pairs) < 2 or len({old - new for old, new in pairs}) == 1:
        return None
    found = ttest_rel(*zip(*pairs, strict=True))
    interval = found.confidence_interval(1 - LEVEL)
    mean = sum(old - new for old, new in pairs) / len(pairs)
    return Gain(
        mean, float(interval.low), float(interval.high), float(found.statistic), float(found.pvalue), len(pairs)
    )


def told_apart(gains: Sequence[Gain]) -> list[bool]:
    """Which gains are told from chance when all are asked together, by Holm's method."""
    order = sorted(range(len(gains)), key=lambda index: gains[index].p)
    told = [False] * len(gains)
    for rank, index in enumerate(order):
        if gains[index].p > LEVEL / (len(gains) - rank):
            break
        told[index] = True
    return told
