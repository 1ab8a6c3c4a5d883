"""Recompute: the activations of a branch are freed, and computed again in the backward pass.

Between forward and backward only what branches read and return is in memory, and during the backward the activations
of one branch at a time. Side effects of a branch happen once: the second pass begins with the buffers and the random
numbers of the first one, and leaves no trace, so that the statistics of BatchNorm are updated once. Whether a branch
writes anything else is observed at its first call (see `observed`), and refused.

Where ``torch.compile`` can't compile a call, it compiles pieces of the function that was called, as if they stood
alone, so that only some of its statements know that a compiler runs them. `recompute` is therefore compiled as a
whole or not at all.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxcollab._torch import dynamo_is_loaded, graph_break, is_traced, is_transformed, never_compile, storage_id
from fxcollab.errors import StateError
from fxcollab.rng import ForeignState
from fxcollab.runtime.observed import Stateful, modules_in, observed, version

P = ParamSpec("P")
R = TypeVar("R")
Registry: TypeAlias = dict[str, Any]


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
    may change the buffers of modules in ``stateful``.

    Raises:
        StateError: the branch wrote into a parameter, or into anything else that its modules hold.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return branch(*inputs)
    if torch.compiler.is_compiling():  # the compiler computes again without effects, and replays random numbers
        own = (part for part in modules_in(stateful) if not type(part).__module__.startswith("torch.nn.modules."))
        if any(part._buffers for part in own):  # its second pass would begin with what the first one wrote
            graph_break()
        return checkpoint(branch, *inputs, use_reentrant=False)
    if is_traced() or is_transformed():  # recorded, or under functorch, where no saved tensors can be replaced
        return branch(*inputs)
    parts = modules_in(stateful)
    again = _Again(branch.__name__, parts)
    with observed(branch, stateful, parts):
        results = checkpoint(branch, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        again.refuse_written_parameters("its forward writes into a parameter", "leave max_norm out of embeddings")
    return results


def recompute_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's output; what its backward needs is computed again there, as by `recompute`."""

    def call(*inputs: Any) -> Any:
        return module(*inputs, **kwargs)

    call.__name__ = type(module).__name__
    return recompute(call, (module,), *args)


class _Again(AbstractContextManager[None]):
    """A second pass begins with the buffers and attributes of the first one; those of now are restored afterwards.

    Of attributes only those matter that torch sets: modes, and the weights of ``nn.utils.weight_norm``.
    """

    def __init__(self, branch: str, parts: Sequence[nn.Module]) -> None:
        self._branch = branch
        self._parameters = [
            (part, name, tensor, version(tensor))
            for part in parts
            for name, tensor in (*part._parameters.items(), *part._buffers.items())
            if tensor is not None and (tensor.requires_grad or name in part._parameters)
        ]
        # A scripted module has views instead, of no buffers.
        self._buffers = [part._buffers for part in parts if isinstance(part._buffers, dict)]
        self._registries: list[Registry] = [*self._buffers, *map(vars, parts)]
        self._before = _cloned(self._buffers)
        self._attributes = [dict(vars(part)) for part in parts]
        self._generators = ForeignState()
        self._exits = ExitStack()

    def __enter__(self) -> None:
        self.refuse_written_parameters(
            "a parameter was written since the forward", "run the backward before the step"
        )
        before = [*_cloned(self._before), *self._attributes]  # cloned again for a third pass
        self._exits.callback(_write, self._registries, [dict(registry) for registry in self._registries])
        self._exits.enter_context(self._generators.again())
        _write(self._registries, before)

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def refuse_written_parameters(self, what: str, hint: str) -> None:
        """Their values are not copied, so a second pass would begin with other ones than the first."""
        for module, name, tensor, before in self._parameters:
            if version(tensor) != before:
                raise StateError(
                    f"A branch can't be computed again: {what}.",
                    where=f"{self._branch}, {type(module).__qualname__}.{name}",
                    why="the second pass would begin with other values",
                    hint=f"{hint}, or transform without recompute",
                )


def _cloned(registries: Sequence[Registry]) -> list[Registry]:
    """The same buffers cloned, except those with gradients; clones share memory where the buffers do."""
    tensors = {id(tensor): tensor for registry in registries for tensor in registry.values() if tensor is not None}
    storages = {key: storage_id(tensor) for key, tensor in tensors.items() if not tensor.requires_grad}
    uses, memo = Counter(storages.values()), dict[int, Any]()
    with torch.no_grad():
        for key, storage in storages.items():  # a deep copy is slower, and knows what shares memory
            tensors[key] = copy.deepcopy(tensors[key], memo) if uses[storage] > 1 else tensors[key].clone()
    return [{name: tensors.get(id(tensor)) for name, tensor in registry.items()} for registry in registries]


def _write(registries: Sequence[Registry], contents: Sequence[Registry]) -> None:
    for registry, values in zip(registries, contents, strict=True):
        for name in registry.keys() - values.keys():
            del registry[name]
        registry.update(values)
