"""The outputs of all heads in either mode, and the original behind a training model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxcollab.plan import training_model, unwrapped


def all_heads(train_model: nn.Module) -> Callable[..., tuple[Any, ...]]:
    """A training model whose every call returns the tuple with one output a head, head 0 first.

    In train mode that is what the training model itself returns; in eval mode it returns head 0's output alone. The
    call sets a mark on the training model: don't use that in another thread meanwhile.

    Args:
        train_model: what `transform` or `load` returned, or a wrapper around it: DDP's, ``torch.compile``'s, one of
            Lightning. The call goes through the wrapper.

    Raises:
        StateError: it is not a training model.
    """
    inner = unwrapped(train_model)

    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        before = inner.returns_all
        inner.returns_all = True
        try:
            outputs: tuple[Any, ...] = train_model(*args, **kwargs)
            return outputs
        finally:
            inner.returns_all = before

    return call


def original(train_model: nn.Module) -> nn.Module:
    """The model that was transformed: the same object, whose tensors are the trunk's and head 0's.

    Args:
        train_model: what `transform` or `load` returned, or a wrapper around it.

    Raises:
        StateError: it is not a training model.
    """
    return training_model(train_model).root
