"""Twins: copies of models on fake tensors, on which the user's Python can run without reaching the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fxcollab._torch import FakeTensor, FakeTensorMode, storage_id
from fxcollab.deep_copy import deep_copy
from fxcollab.rng import preserve_rng_state

_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True, eq=False)
class Twin:
    """A deep copy of a model in which other tensors stand for its own.

    Attributes:
        model: the copy.
        original: the model.
        tensors: the model's tensors, each with its stand-in.
        shared: paths of what can't be copied, and is the model's own.
        mode: makes and computes with the fake tensors; None where the stand-ins have values.
    """

    model: nn.Module
    original: nn.Module
    tensors: Sequence[tuple[Tensor, Tensor]]
    shared: tuple[str, ...]
    mode: FakeTensorMode | None

    @cached_property
    def stand_ins(self) -> dict[int, Tensor]:
        """The stand-in of each of the model's tensors, by the id of that tensor."""
        return {id(tensor): stand_in for tensor, stand_in in self.tensors}

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which to call the copy."""
        with preserve_rng_state(), without_tracebacks(), self.mode or nullcontext():
            yield


def twin_of(model: nn.Module, *, real: bool = False) -> Twin:
    """The twin of a model; with ``real`` its tensors are copies with the same values, not fake ones."""
    mode = None if real else FakeTensorMode(allow_non_fake_inputs=True)
    copied = deep_copy(model, clone_of if mode is None else FakeTensors(mode))
    return Twin(copied.value, model, copied.tensors, copied.shared, mode)


class FakeTensors:
    """Makes fake tensors like given ones; those of views of one storage share one as well."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """A fake tensor for a tensor, a parameter for a parameter."""
        if type(tensor) not in _ORDINARY or tensor.layout is not torch.strided or tensor.is_quantized:
            return self._mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
        made = FakeTensor(self._mode, self._meta(tensor), tensor.device)
        made.requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            made._is_param = True  # as nn.Parameter marks tensors of other classes
        made.__dict__.update({k: v for k, v in tensor.__dict__.items() if k not in made.__dict__})
        return made

    def _meta(self, tensor: Tensor) -> Tensor:
        key = storage_id(tensor)
        if key not in self._storages:
            size = tensor.untyped_storage().nbytes()
            self._storages[key] = torch.empty(size, dtype=torch.uint8, device="meta").untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype, device="meta")
        return made.set_(self._storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())


def clone_of(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` with storage of its own; a parameter for a parameter."""
    made = tensor.detach().clone()
    made = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    made.__dict__.update(tensor.__dict__)
    return made.requires_grad_(tensor.requires_grad)


@contextmanager
def without_tracebacks() -> Iterator[None]:
    """Disable the logger that prints a traceback for every error on fake tensors."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
