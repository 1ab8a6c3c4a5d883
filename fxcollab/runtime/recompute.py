"""Recompute: what a branch keeps for its backward is dropped, and computed again when the backward gets there.

Between forward and backward only what branches read and return is alive, and during the backward the activations of
one branch at a time. What a branch does beside returning values happens once: in the second pass modules hold what
they began with, so that statistics of BatchNorm are updated once and state that is both read and written is read
as it was (`holders` says what is held); and random numbers are those of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxcollab._torch import graph_break, is_traced, is_transformed
from fxcollab.errors import StateError
from fxcollab.module_state.holders import Holder, holders_of
from fxcollab.module_state.snapshot import Snapshot
from fxcollab.module_state.tensors import version
from fxcollab.rng import ForeignState
from fxcollab.runtime.compiled import whole

Stateful: TypeAlias = nn.Module | tuple[nn.Module, str]
"""A module with everything it holds, or one tensor by its name in a module."""


@whole
def recompute(branch: Callable[..., Any], stateful: Sequence[Stateful], *inputs: Any) -> Any:
    """What ``branch`` returns for ``inputs``; what its backward needs is computed again there.

    Without gradients, under ``torch.func`` and where the model is exported or traced, it is a plain call.

    Args:
        branch: a function of the inputs; it may change what ``stateful`` holds, except values of parameters.
        stateful: the modules that it calls and the tensors that it reads.
        inputs: tensors and other values.

    Raises:
        StateError: the branch wrote into a parameter.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return branch(*inputs)
    if torch.compiler.is_compiling():  # the compiler computes again without effects, and replays random numbers
        if any(_may_be_written_back(held) for held in stateful):
            graph_break()
        return checkpoint(branch, *inputs, use_reentrant=False)
    if is_traced() or is_transformed():  # recorded, or under functorch, where no saved tensors can be replaced
        return branch(*inputs)
    again = _Again(branch.__name__, stateful)
    results = checkpoint(branch, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
    again.refuse_written_parameters("its forward writes into a parameter", "leave max_norm out of embeddings")
    return results


def _may_be_written_back(held: Stateful) -> bool:
    """Whether it has buffers of no layer of torch: a second pass that is compiled would begin with written ones."""
    parts = held.modules() if isinstance(held, nn.Module) else held[:1]
    return any(part._buffers and not type(part).__module__.startswith("torch.nn.modules.") for part in parts)


class _Again(AbstractContextManager[None]):
    """Every second pass begins with the state that the first one began with, and leaves none behind."""

    def __init__(self, branch: str, stateful: Sequence[Stateful]) -> None:
        self._branch = branch
        holders = _holders(stateful)
        self._parameters = [(*found, version(found[-1])) for found in Snapshot.of(holders).with_gradients()]
        self._before = Snapshot.of(held for held in holders if not _is_parameters(held)).cloned()
        self._generators = ForeignState()
        self._left = ExitStack()

    def __enter__(self) -> None:
        self.refuse_written_parameters(
            "a parameter was written since the forward", "run the backward before the step"
        )
        with ExitStack() as stack:
            stack.callback(Snapshot.of(self._before.holders).restore)
            self._before.cloned().restore()
            stack.enter_context(self._generators.again())
            self._left = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._left.close()

    def refuse_written_parameters(self, what: str, hint: str) -> None:
        """Their values are not kept twice, so that a second pass would begin with others than the first one."""
        for holder, name, tensor, before in self._parameters:
            if version(tensor) != before:
                raise StateError(
                    f"A branch can't be computed again: {what}.",
                    where=f"{self._branch}, {type(holder.module).__qualname__}.{name}",
                    why="the second pass would begin with other values",
                    hint=f"{hint}, or transform without recompute",
                )


def _holders(stateful: Sequence[Stateful]) -> list[Holder]:
    """What is held by the modules, and where the tensors stand that are read by themselves."""
    found = holders_of((held for held in stateful if isinstance(held, nn.Module)), own=True)
    known = {id(holder.value) for holder in found}
    for module, name in (held for held in stateful if isinstance(held, tuple)):
        registry = module._buffers if name in module._buffers else module.__dict__
        if id(registry) not in known:
            known.add(id(registry))
            found.append(Holder("", registry, module))
    return found


def _is_parameters(holder: Holder) -> bool:
    """Whether it is where parameters stand; FSDP puts whole ones there for the second pass, as for the first."""
    return holder.value is holder.module._parameters
