"""Buffers that a forward assigns: the graph writes the new value into the tensor that is there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from fxcollab.runtime.operators import set_data_
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.twin import Twin


class AssignedBuffers:
    """The buffers of a twin, and the nodes ``set_data_(buffer, value)`` that stand for assignments to them."""

    def __init__(self, twin: Twin) -> None:
        self._root = twin.model
        self._buffers = dict(_buffers_by_place(twin.model))
        self._writes: dict[str, fx.Node] = {}

    def place_of(self, module: nn.Module, name: str) -> str | None:
        """The full name of a buffer that may be assigned; None where the model had none."""
        path = next((path for path, part in self._root.named_modules() if part is module), None)
        full = f"{path}.{name}".lstrip(".")
        if path is None or full not in self._buffers:
            return None
        if sum(buffer is self._buffers[full] for buffer in self._buffers.values()) > 1:
            raise UntraceableError(f"buffer {full} is assigned, and has other names that keep the old tensor")
        return full

    def note(self, name: str, write: fx.Node) -> None:
        """Note the node that stands for an assignment."""
        self._writes[name] = write

    def keep_values_before(self) -> None:
        """Put the buffers back, and let what was read before an assignment be another tensor, which isn't written."""
        for name in self._buffers:
            module, leaf = self._owner(name)
            if not isinstance(module, torch.jit.ScriptModule) and module._buffers.get(leaf) is None:
                raise UntraceableError(f"the forward removes buffer {name}, which a graph can't record")
        for name, write in self._writes.items():
            module, leaf = self._owner(name)
            module._buffers[leaf] = self._buffers[name]
            _keep_value_before(write)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        owner, _, leaf = name.rpartition(".")
        return self._root.get_submodule(owner), leaf


def _keep_value_before(write: fx.Node) -> None:
    old = write.args[0]
    assert isinstance(old, fx.Node)
    writes = [user for user in old.users if user.target is set_data_ and user.args[0] is old]
    readers = [user for user in old.users if user not in writes]
    if not readers and all(user.args[1] is not old for user in writes):
        return
    with write.graph.inserting_after(old):
        clone = write.graph.call_method("clone", (old,))
    for reader in readers:
        reader.replace_input_with(old, clone)
    for user in writes:
        user.args = (old, clone if user.args[1] is old else user.args[1])


def _buffers_by_place(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers by all places where they are registered."""
    for path, module in root.named_modules():
        yield from module.named_buffers(path, recurse=False, remove_duplicate=False)
