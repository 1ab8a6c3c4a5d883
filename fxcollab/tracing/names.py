"""Names: what a graph calls the tensors and objects that its nodes refer to."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fxcollab._torch import FakeTensor, pytree
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.twin import Twin, same_members


class Names:
    """Names of the state of a twin's model, of constants, and of objects that modules hold.

    State has the model's own names. Any other tensor is a constant; one that equals one of ``known``, those of the
    other mode's graph, gets its name. Tensors of examples are noted only if they are ``real``: fake ones are known.

    Attributes:
        constants: the constants, by name.
        tensors: state and constants, by name.
    """

    def __init__(self, twin: Twin, known: Mapping[str, Tensor], *, real: bool) -> None:
        named = dict(_state_by_name(twin.original))
        names = {id(tensor): name for name, tensor in named.items()}
        self._root = twin.model
        self._originals = {id(stand_in): tensor for tensor, stand_in in twin.tensors}
        self._state = {**names, **{key: names[id(t)] for key, t in self._originals.items() if id(t) in names}}
        self._of_constants: dict[int, str] = {}
        self.constants: dict[str, Tensor] = dict(known)
        self.tensors: Mapping[str, Tensor] = ChainMap(self.constants, named)
        self._real, self._of_examples = real, WeakIdKeyDictionary()
        self._held: dict[int, Held] = dict(reversed(list(_attributes_by_id(twin.model))))  # each by its first name

    def is_state(self, tensor: Tensor) -> bool:
        """Whether it is a tensor of the model, or stands for one."""
        return id(tensor) in self._state or id(tensor) in self._originals

    def of_state(self, tensor: Any) -> str | None:
        """The name of a parameter, a buffer, or a tensor in an attribute; None for any other value."""
        return self._state.get(id(tensor))

    def note_example(self, value: Any) -> None:
        """Note that tensors in a value belong to an example or were computed for it: they can't be constants."""
        for leaf in pytree.tree_leaves(value) if self._real else ():
            if isinstance(leaf, Tensor):
                self._of_examples[leaf] = None

    def is_of_example(self, value: Any) -> bool:
        """Whether a tensor in a value belongs to an example or was computed for it."""
        leaves = pytree.tree_leaves(value) if self._real else ()
        return any(isinstance(leaf, Tensor) and leaf in self._of_examples for leaf in leaves)

    def of_tensor(self, tensor: Tensor) -> str:
        """The name of a tensor: of state, or else of a constant."""
        found = self._state.get(id(tensor))
        if found is not None:
            return found
        constant = self._originals.get(id(tensor), tensor)  # a tensor of the model in a list or a dict
        if isinstance(constant, FakeTensor) or self.is_of_example(constant):
            raise UntraceableError(
                f"a tensor of shape {tuple(tensor.shape)} was computed from the model's state where the graph can't "
                "see it (in train() or eval(), a hook, a leaf module or another thread), and would be a constant"
            )
        if id(constant) not in self._of_constants:
            self._of_constants[id(constant)] = name = self._of_new_constant(constant)
            self.constants[name] = constant
        return self._of_constants[id(constant)]

    def _of_new_constant(self, constant: Tensor) -> str:
        used = set(self._of_constants.values())
        for name, known in self.constants.items():
            if name not in used and known.dtype == constant.dtype and torch.equal(known, constant):
                return name
        count = len(self.constants)
        while hasattr(self._root, f"_tensor_constant{count}"):
            count += 1
        return f"_tensor_constant{count}"

    def of_object(self, value: Any) -> str | None:
        """The name of an attribute of a module or its class, such as a configuration; None for any other value."""
        _, name, before = self._held.get(id(value), (None, None, None))
        if before is not None and not same_members(before, vars(value)):
            raise UntraceableError(f"the forward changes {name}, which it hands on, and a graph can't record that")
        return name

    def of_changed_objects(self) -> Iterator[str]:
        """The names of objects with attributes that have been assigned since."""
        for held, name, before in self._held.values():
            if before is not None and not same_members(before, vars(held)):
                yield name


Held = tuple[Any, str, dict[str, Any] | None]
"""An object, its name, and the attributes that it has, if any."""
_NEVER_OBJECTS = (
    type(None), bool, int, float, str, bytes, tuple, list, dict, set, type, FunctionType, nn.Module, Tensor,
)  # fmt: skip


def _attributes_by_id(root: nn.Module) -> Iterator[tuple[int, Held]]:
    """What modules and their classes hold, by its id, as it is before a forward assigns anything."""
    seen = set(nn.Module.__mro__)
    for path, module in root.named_modules():
        owners = [module, *(cls for cls in type(module).__mro__ if cls not in seen)]
        seen.update(type(module).__mro__)
        for owner in owners:
            for name, held in vars(owner).items():
                if not isinstance(held, _NEVER_OBJECTS):
                    own = getattr(held, "__dict__", None)
                    yield id(held), (held, f"{path}.{name}".lstrip("."), None if own is None else dict(own))


def _state_by_name(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors that are attributes; registered state comes last, so that its names win."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        yield from ((prefix + k, v) for k, v in module.__dict__.items() if isinstance(v, Tensor))
    yield from reversed(list(nn.Module.named_buffers(root)))
    yield from reversed(list(nn.Module.named_parameters(root)))
