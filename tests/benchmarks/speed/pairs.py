"""Times of two things that do the same, taken in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def ratio(ours: Callable[[], object], other: Callable[[], object], pairs: int) -> dict[str, Any]:
    """Seconds of ``other`` over those of ``ours``, pair by pair: above 1 ours is faster.

    The median of the pairs, and the least and the most of them; after one run of each that doesn't count. Every other
    pair begins with the other: who comes first finds caches and memory as the one before left them.
    """
    _seconds(ours), _seconds(other)
    taken = [_pair(ours, other, swapped=bool(count % 2)) for count in range(pairs)]
    ratios = [there / here for here, there in taken]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "seconds": round(statistics.median(here for here, _ in taken), 5),
        "seconds of the other": round(statistics.median(there for _, there in taken), 5),
    }


def _pair(ours: Callable[[], object], other: Callable[[], object], *, swapped: bool) -> tuple[float, float]:
    if swapped:
        there, here = _seconds(other), _seconds(ours)
        return here, there
    return _seconds(ours), _seconds(other)


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
