"""Recompute: the activations of a branch are freed, and computed again in the backward pass.

Between forward and backward only what branches read and return is in memory, and during the backward the activations
of one branch at a time. Side effects of a branch happen once: the second pass begins with the module state (see
`holders`) and the random numbers of the first one, and leaves no trace, so that the statistics of BatchNorm are
updated once.

Where ``torch.compile`` can't compile a call, it compiles pieces of the function that was called, as if they stood
alone, so that only some of its statements know that a compiler runs them. `recompute` is therefore compiled as a
whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxcollab._torch import dynamo_is_loaded, graph_break, is_traced, is_transformed, never_compile
from fxcollab.errors import StateError
from fxcollab.module_state.holders import Holder, holders_of
from fxcollab.module_state.snapshot import Snapshot
from fxcollab.module_state.tensors import version
from fxcollab.rng import ForeignState

Stateful: TypeAlias = nn.Module | tuple[nn.Module, str]
"""A module with all its state, or one tensor by its name in a module."""
P = ParamSpec("P")
R = TypeVar("R")


def _compiled_as_a_whole(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which is compiled as a whole into the graph around it or, with all that it calls, not at all.

    For that `never_compile_pieces` has to be called before anything is compiled.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not dynamo_is_loaded():
            return function(*args, **kwargs)
        found: R = _uncompiled(function)(*args, **kwargs)
        return found

    return call


_CODE = _compiled_as_a_whole(lambda: None).__code__


@cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return made


def never_compile_pieces() -> None:
    """Keep ``torch.compile`` from calls of `recompute` that it can't compile as a whole."""
    never_compile(_CODE)


@_compiled_as_a_whole
def recompute(branch: Callable[..., Any], stateful: Sequence[Stateful], *inputs: Any) -> Any:
    """What ``branch`` returns for ``inputs``; what its backward needs is computed again there.

    Without gradients, under ``torch.func`` and where the model is exported or traced, it is a plain call. The branch
    may change the modules and tensors in ``stateful``, except values of parameters.

    Raises:
        StateError: the branch wrote into a parameter.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return branch(*inputs)
    if torch.compiler.is_compiling():  # the compiler computes again without effects, and replays random numbers
        if any(map(_may_be_written_back, stateful)):
            graph_break()
        return checkpoint(branch, *inputs, use_reentrant=False)
    if is_traced() or is_transformed():  # recorded, or under functorch, where no saved tensors can be replaced
        return branch(*inputs)
    again = _Again(branch.__name__, stateful)
    results = checkpoint(branch, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
    again.refuse_written_parameters("its forward writes into a parameter", "leave max_norm out of embeddings")
    return results


def _may_be_written_back(state: Stateful) -> bool:
    """Whether it has buffers, except in torch's layers: a compiled second pass would begin with written ones."""
    parts = state.modules() if isinstance(state, nn.Module) else state[:1]
    return any(part._buffers and not type(part).__module__.startswith("torch.nn.modules.") for part in parts)


class _Again(AbstractContextManager[None]):
    """A second pass begins with the state that the first one began with, which is restored afterwards."""

    def __init__(self, branch: str, stateful: Sequence[Stateful]) -> None:
        self._branch = branch
        holders = _holders(stateful)
        self._parameters = [(*found, version(found[-1])) for found in Snapshot.of(holders).with_gradients()]
        self._before = Snapshot.of(holder for holder in holders if not _is_parameters(holder)).cloned()
        self._generators = ForeignState()
        self._exits = ExitStack()

    def __enter__(self) -> None:
        self.refuse_written_parameters(
            "a parameter was written since the forward", "run the backward before the step"
        )
        with ExitStack() as stack:
            stack.callback(Snapshot.of(self._before.holders).restore)
            self._before.cloned().restore()
            stack.enter_context(self._generators.again())
            self._exits = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def refuse_written_parameters(self, what: str, hint: str) -> None:
        """Their values are not copied, so a second pass would begin with other ones than the first."""
        for holder, name, tensor, before in self._parameters:
            if version(tensor) != before:
                raise StateError(
                    f"A branch can't be computed again: {what}.",
                    where=f"{self._branch}, {type(holder.module).__qualname__}.{name}",
                    why="the second pass would begin with other values",
                    hint=f"{hint}, or transform without recompute",
                )


def _holders(stateful: Sequence[Stateful]) -> list[Holder]:
    """The holders of the modules' state, and of the tensors that are read by themselves."""
    found = holders_of((one for one in stateful if isinstance(one, nn.Module)), own=True)
    known = {id(holder.value) for holder in found}
    for module, name in (one for one in stateful if isinstance(one, tuple)):
        registry = module._buffers if name in module._buffers else module.__dict__
        if id(registry) not in known:
            known.add(id(registry))
            found.append(Holder("", registry, module))
    return found


def _is_parameters(holder: Holder) -> bool:
    """Whether it is a registry of parameters; FSDP puts whole ones there for both passes."""
    return holder.value is holder.module._parameters
