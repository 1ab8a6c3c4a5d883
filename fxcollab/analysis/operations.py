"""What operations do to storage, seen by modes of torch while they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxcollab._torch import CONVERSION, DEVICE_OF, OpOverload, TorchDispatchMode, pytree, schema_of, storage_id
from fxcollab.flops import flops_of


class Operations:
    """What was read, written and drawn since the last `start`.

    Storage counts as one where a result may be a view of an argument: because it is one here, because torch declares
    that it can be (``reshape``, ``contiguous``), or because a conversion to the type that it has would be none.

    Attributes:
        read: keys of the storages of all arguments.
        written: keys of the storages of arguments that were written.
        random: whether random numbers were drawn.
        flops: floating point operations, without those in the graphs of operators such as ``torch.cond``.
    """

    def __init__(self) -> None:
        self._same: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no two storages have the same key
        self.start()

    def start(self) -> None:
        """Forget what was seen before, but not which storages count as one."""
        self.read: set[int] = set()
        self.written: set[int] = set()
        self.random = False
        self.flops = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which operations are seen."""
        with _Functions(self), _Dispatch(self):
            yield

    def classes(self, keys: Iterable[int]) -> set[int]:
        """One key for each group of storages that count as one."""
        return {self._root(key) for key in keys}

    def _root(self, key: int) -> int:
        while key in self._same:
            key = self._same[key]
        return key

    def join(self, one: Tensor, other: Tensor) -> None:
        """Count the storages of two tensors as one."""
        first, second = self._root(storage_id(one)), self._root(storage_id(other))
        if first != second:
            self._same[second] = first

    def see(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what a call of an operator did."""
        self._alive.append(result)
        if not isinstance(function, OpOverload):
            self._see_higher_order(function, args, kwargs, result)
            return
        operator = _operator(function)
        self.flops += flops_of(function, args, kwargs, result)
        given = {**operator.defaults, **dict(zip(operator.defaults, args, strict=False)), **kwargs}
        written = operator.written | (_STATISTICS if given.get("training") else set())
        for name, value in given.items():
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    key = storage_id(tensor)
                    self.read.add(key)
                    if name in written:
                        self.written.add(key)
        if function is CONVERSION:
            self.join(args[0], result)
        if operator.random and not self.random:
            rates = [given[name] for name in _RATES & given.keys()]
            self.random = not rates or any(rate != 0 for rate in rates)

    def _see_higher_order(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what an operator did that runs graphs, such as ``torch.cond``: they may draw random numbers."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.random = True
        self.read.update(map(storage_id, tensors))
        try:
            arguments = function.gen_schema(*args, **kwargs).arguments
            writes = any(one.alias_info is not None and one.alias_info.is_write for one in arguments)
        except Exception:  # it has none, or can't say: it is taken to do everything
            writes = True
        if writes:
            self.written.update(map(storage_id, tensors))
            for tensor in (leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)):
                for operand in tensors:
                    self.join(operand, tensor)


_RATES = {"dropout_p", "p"}
"""Arguments of random operators that draw nothing if these are 0."""
_STATISTICS = {"running_mean", "running_var"}
"""Arguments that batch norm writes in training, which its schema doesn't say."""


class _Operator(NamedTuple):
    """What the schema of an operator says: arguments with their defaults, those that it writes, whether it draws."""

    defaults: dict[str, Any]
    written: set[str]
    random: bool


@cache
def _operator(function: OpOverload) -> _Operator:
    """From the schema, which takes long to ask."""
    arguments = schema_of(function).arguments
    return _Operator(
        {one.name: one.default_value for one in arguments},
        {one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write},
        torch.Tag.nondeterministic_seeded in function.tags,
    )


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, operations: Operations) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            return NotImplemented  # the tensor answers
        result = func(*args, **(kwargs or {}))
        self._operations.see(func, args, kwargs or {}, result)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__set__":  # x.data = y is no operator
            self._operations.written.add(storage_id(args[0]))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            for position in _viewed(getattr(func, "__name__", "")):
                if position < len(args) and isinstance(args[position], Tensor):
                    self._operations.join(args[position], result)
        return result


@cache
def _viewed(name: str) -> frozenset[int]:
    """The positions of the arguments of which torch declares that a function's result may be a view."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    schemas = [schema_of(getattr(packet, overload)) for overload in packet.overloads()] if packet is not None else []
    return frozenset(
        position
        for schema in schemas
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None
        and not argument.alias_info.is_write
        and any(returned.alias_info is not None for returned in schema.returns)
    )
