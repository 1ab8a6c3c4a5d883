"""Levels that are hardly levels: those that do next to none of the work, or have next to none of the parameters."""

from __future__ import annotations

from collections.abc import Iterator

from fxcollab.analysis.partition import Partition
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.functional import tensors_of

LEAST_WORK = 1 / 20
LEAST_PARAMETERS = 1 / 100


def small_levels(captured: CollabGraphModule, cut: Partition) -> Iterator[str]:
    """A sentence for each level with less than a twentieth of the work, and each split with few parameters behind it.

    Work is that of the forward in train mode on the inputs of the observation; nothing is said of it where a node
    could not be observed.
    """
    splits = cut.tree.splits
    work = _work(captured, cut) if splits else []
    for level, share in enumerate(work):
        if share < LEAST_WORK:
            place = " and ".join(repr(split) for split in splits[max(level - 1, 0) : level + 1])
            where = (
                f"before {place}" if not level else f"behind {place}" if level == len(splits) else f"between {place}"
            )
            yield f"only {100 * share:.1f} % of the forward's operations lie {where}"
    parameters = {id(each): (name, each.numel()) for name, each in tensors_of(captured).items() if each.requires_grad}
    total = sum(count for _, count in parameters.values())
    for level, split in enumerate(splits, start=1):
        behind = sum(count for name, count in parameters.values() if cut.state[name] >= level)
        if behind < LEAST_PARAMETERS * total:
            yield f"only {100 * behind / total:.1f} % of the parameters lie behind split {split!r}"


def _work(captured: CollabGraphModule, cut: Partition) -> list[float]:
    """The share of each level in the work of one head's forward; [] where it isn't known."""
    levels = cut.nodes[captured.modes.train]
    if not all(cut.observation.of(node).certain for node in levels if node.op == "call_module"):
        return []
    work = [0] * (cut.tree.depth + 1)
    for node, level in levels.items():
        work[level] += cut.observation.of(node).flops
    total = sum(work)
    return [each / total for each in work] if total else []
