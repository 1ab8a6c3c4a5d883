"""Watched: a call of one sibling for all is refused where it did what does not reach the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from fxcollab.errors import FxCollabError
from fxcollab.generators import ForeignState
from fxcollab.held import Snapshot
from fxcollab.runtime.siblings import IN_TURN, Sibling, numbers_of, unlike


@contextmanager
def watched(first: Sibling) -> Iterator[None]:
    """A call of all siblings in the modules of the ``first``.

    Raises:
        StateError: what its modules hold beside their registries was changed, Python's or numpy's random numbers were
            drawn, or something can't be done for all at once. Nothing stays of it.
    """
    if torch.compiler.is_compiling():
        yield
        for holder in first.others:
            if numbers_of(holder.module) != holder.value:
                raise unlike(f"the forward of a {type(holder.module).__qualname__} sets attributes")
        return
    before, generators = Snapshot.of(first.others), ForeignState()
    try:
        with _no_fast_path(), _no_hooks():
            yield
        for holder, key in before.changed():
            name = holder.path if key is None else f"{holder.path}[{key!r}]"
            raise unlike("the forward changes what is held there", at=(first, holder.module, name))
        if generators.foreign_numbers_were_drawn():
            raise unlike("numbers of Python's or numpy's generators were drawn once for all of them")
    except BaseException as error:  # an interrupt, too, leaves nothing behind
        before.restore()
        generators.restore()
        if isinstance(error, FxCollabError):
            raise
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_VMAP):
            raise unlike(str(error).partition("\n")[0]) from error
        error.add_note(f"  while branches ran as one, under torch.vmap; where that is the cause, {IN_TURN}")
        raise


_NO_HOOKS = "vmap: a branch checkpoints its own parts, or keeps what is saved for the backward elsewhere"
_OF_VMAP = ("vmap", "Batching rule", "data pointer of Tensor", "BatchedTensor", "match the broadcast shape")


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Attention's is taken where no parameter has a gradient, which slices of stacks don't tell."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _no_hooks() -> Iterator[None]:
    """Saved tensors' would be called again outside of vmap, with a dimension more; those around the call are fine."""
    with ExitStack() as stack:
        with suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS))
        yield
