"""Recompute: what a branch keeps for its backward is dropped, and computed again when the backward gets there.

Between forward and backward only what branches read and return is alive, and during the backward the activations of
one branch at a time. What a branch does beside returning values happens once: in the second pass its buffers are
copies of those it began with, so that BatchNorm's statistics are updated once and state that a forward both reads and
writes is read as it was; and random numbers are those of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import checkpoint

from fxcollab.generators import ForeignState
from fxcollab.runtime.fed import Fed

Stateful: TypeAlias = nn.Module | tuple[nn.Module, str]
"""A module with all its buffers, or one buffer by its name in a module."""


def recompute(branch: Callable[..., Any], stateful: Sequence[Stateful], *inputs: Any) -> Any:
    """What ``branch`` returns for ``inputs``; what its backward needs is computed again there.

    Without gradients, under ``torch.func`` and where the model is exported or traced, it is a plain call.

    Args:
        branch: a function of the inputs; it may read modules, and write their buffers.
        stateful: where the buffers are that it may write.
        inputs: tensors and other values.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return branch(*inputs)
    if torch.compiler.is_compiling():  # the compiler computes again without effects, and replays random numbers
        return checkpoint(branch, *inputs, use_reentrant=False)
    if _is_recorded():
        return branch(*inputs)
    again = _Again(stateful)
    return checkpoint(branch, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again))


def _is_recorded() -> bool:
    """Whether what runs is recorded, or under functorch, where no saved tensors can be replaced."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return get_proxy_mode() is not None or torch._C._functorch.peek_interpreter_stack() is not None


class _Again(AbstractContextManager[None]):
    """Every second pass begins with the state that the first one began with, and leaves none behind."""

    def __init__(self, stateful: Sequence[Stateful]) -> None:
        self._places = list(_places(stateful))
        self._before = _clones([registry[name] for registry, name in self._places])
        self._generators = ForeignState()
        self._left = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            now = [registry[name] for registry, name in self._places]
            stack.callback(self._put, now)
            self._put(_clones(self._before))
            stack.enter_context(self._generators.again())
            self._left = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._left.close()

    def _put(self, buffers: Sequence[Tensor]) -> None:
        for (registry, name), buffer in zip(self._places, buffers, strict=True):
            registry[name] = buffer


def _places(stateful: Sequence[Stateful]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where buffers are registered, each place once."""
    seen: set[tuple[int, str]] = set()
    for held in stateful:
        for registry, name in _registered(held):
            if registry[name] is not None and (id(registry), name) not in seen:
                seen.add((id(registry), name))
                yield registry, name


def _registered(held: Stateful) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(held, tuple):
        module, name = held
        yield module._buffers, name
        return
    for part in (held.module if isinstance(held, Fed) else held).modules():
        yield from ((part._buffers, name) for name in part._buffers)


def _clones(buffers: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each; what was one tensor stays one."""
    copies = {id(buffer): buffer for buffer in buffers}
    with torch.no_grad():
        copies = {key: buffer.clone() for key, buffer in copies.items()}
    return [copies[id(buffer)] for buffer in buffers]
