"""What is allocated while a mode is on, counted storage by storage as torch makes and frees them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that operators make, now and at the most.

    Args:
        standing: tensors that exist before; they count from the start.
    """

    def __init__(self, standing: Iterable[Tensor]) -> None:
        super().__init__()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live = self.peak = 0
        for tensor in standing:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False

    def _freed(self, size: int) -> None:
        self.live -= size
