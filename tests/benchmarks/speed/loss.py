"""The collaborative loss against its equations written naively, head by head: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fxcollab
from tests.benchmarks.rows import Row
from tests.benchmarks.speed.pairs import ratio

HEADS, BATCH, CLASSES = 8, 1024, 1000


def cases() -> Iterator[tuple[str]]:
    """Eager, and both compiled."""
    return ((how,) for how in ("eager", "compiled"))


def measure(how: str) -> Row:
    """Time of a step of the loss alone, and the most memory above what is there before it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    z = [(2 * torch.randn(BATCH, CLASSES, device=device)).requires_grad_() for _ in range(HEADS)]
    y = torch.randint(CLASSES, (BATCH,), device=device)
    ours: Callable[..., Tensor] = fxcollab.CollaborativeLoss()
    other: Callable[..., Tensor] = naive
    if how == "compiled":
        ours, other = torch.compile(ours), torch.compile(other)
    row = ratio(lambda: _step(ours, z, y), lambda: _step(other, z, y), pairs=15)
    if how == "eager":
        here, there = (_extra_bytes(loss, z, y) for loss in (ours, other))
        row |= {"bytes": here, "bytes of the other": there, "memory": round(here / there, 3)}
    return row


def conclusion(rows: list[Row]) -> str:
    """How much faster, in how much memory."""
    return ", ".join(f"{row['case'][0]} {row['ratio']:.2f}x as fast as the equations" for row in rows) + (
        f", {rows[0]['memory']:.0%} of their extra memory"
    )


def naive(heads: list[Tensor], target: Tensor) -> Tensor:
    """Equations 2 to 4 as they stand, for beta = 0.5 and T = 2."""
    total = heads[0].new_zeros(())
    for h, z in enumerate(heads):
        others = [other.detach() for j, other in enumerate(heads) if j != h]
        q = torch.softmax(sum(others[1:], others[0]) / len(others) / 2, 1)
        hard = F.cross_entropy(z, target)
        soft = -(q * torch.log_softmax(z / 2, 1)).sum(1).mean()
        total = total + 0.5 * hard + 0.5 * 4 * soft
    return total


def _step(loss: Callable[..., Tensor], z: list[Tensor], y: Tensor) -> None:
    for head in z:
        head.grad = None
    loss(z, y).backward()


def _extra_bytes(loss: Callable[..., Tensor], z: list[Tensor], y: Tensor) -> int:
    """The most that is alive at once beside what is there before the step; the gradients of the logits count."""
    for head in z:
        head.grad = None
    if z[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(loss, z, y)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as seen:
        loss(z, y).backward()
    alive = most = 0
    for event in _allocations(seen):
        alive += event
        most = max(most, alive)
    return most


def _allocations(seen: Any) -> Iterator[int]:
    """Bytes, negative where they are freed, in the order of time."""
    kinds = torch._C._profiler._EventType.Allocation
    found = []

    def walk(events: Any) -> None:
        for event in events:
            if event.tag == kinds:
                found.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(seen.profiler.kineto_results.experimental_event_tree())
    return (size for _, size in sorted(found))
