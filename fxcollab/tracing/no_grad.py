"""What is computed under ``torch.no_grad()``: recorded so that no gradient reaches what it was given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxcollab._torch import pytree
from fxcollab.runtime.operators import GradientMethod, stop_gradient, writes_in_place

Record = Callable[[Any, tuple[Any, ...]], fx.Proxy]
"""Records the call of a function on arguments."""


class NoGradRegion:
    """The values of one region without gradients; several that follow one another are forgotten between them.

    Args:
        record: records a call of a function.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._detached: dict[fx.Node, fx.Proxy] = {}  # by the values that have a gradient
        self._free: set[fx.Node] = set()  # those that have none

    def holds(self, kind: str, target: Any) -> bool:
        """Whether an operation that is recorded now computes without gradients."""
        if torch.is_grad_enabled():
            self._detached.clear()
            self._free.clear()
            return False
        return kind.startswith("call") and target is not stop_gradient and not isinstance(target, GradientMethod)

    def recorded(self, create: Callable[[Any, Any], Any], kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """The value of an operation, which ``create`` records with the arguments that it is to have."""
        given = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy))
        writes = writes_in_place(target, kwargs)
        if writes or "out" in kwargs or target is operator.setitem:  # which autograd forbids, or would note
            value = create(*pytree.tree_map_only(fx.Proxy, self._without_gradient, (args, kwargs)))
            return args[0] if writes else value
        value = create(args, kwargs)
        if kind != "call_module" and all(leaf.node in self._free for leaf in given):
            self._free.add(value.node)
            return value
        return self._record(stop_gradient, (value, given))  # an operation may return what it is given

    def _without_gradient(self, value: fx.Proxy) -> fx.Proxy:
        """One node for each value."""
        if value.node in self._free:
            return value
        if value.node not in self._detached:
            self._detached[value.node] = self._record(stop_gradient, (value,))
            self._free.add(self._detached[value.node].node)
        return self._detached[value.node]
