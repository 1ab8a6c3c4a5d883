"""Run a step of a captured model and say at every moment which node is at work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

from fxcollab._torch import pytree
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.fx_utils import Interpreter

Phase: TypeAlias = Literal["forward", "backward"]
Moment: TypeAlias = tuple[Phase, fx.Node]


class Attributed(Interpreter):
    """Tells ``enter`` which node is run: forward, and backward by hooks of autograd's nodes.

    Args:
        captured: what is run, in its present mode.
        enter: called with each moment as it begins, more than once where nodes take turns.
        saw: called with each node and its value.
    """

    def __init__(
        self,
        captured: CollabGraphModule,
        enter: Callable[[Moment], None],
        saw: Callable[[fx.Node, Any], None] = lambda node, value: None,
    ) -> None:
        super().__init__(captured)
        self._enter, self._saw = enter, saw

    def run_node(self, n: fx.Node) -> Any:
        """Run it as usual, and tell."""
        self._enter(("forward", n))
        value = super().run_node(n)
        if n.op != "output":
            self._saw(n, value)
            self._mark(n, value)
        return value

    def _mark(self, node: fx.Node, value: Any) -> None:
        functions: list[Any] = [leaf.grad_fn for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        while functions:
            function = functions.pop()
            if function is None or _SEEN in function.metadata or hasattr(function, "variable"):
                continue
            function.metadata[_SEEN] = True  # on itself: whoever held it would keep what it saved
            function.register_prehook(partial(_tell, self._enter, node))  # not self: a circle that nothing would free
            functions += [following for following, _ in function.next_functions]


_SEEN = "fxcollab"


def _tell(enter: Callable[[Moment], None], node: fx.Node, gradients: object) -> None:
    enter(("backward", node))


def _real(value: Tensor) -> Tensor:
    return value.real if value.is_complex() else value


def backward(outputs: object) -> None:
    """From the sum of all that carries a gradient."""
    leaves = (leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad)
    losses = [_real(leaf).sum() if leaf.ndim else _real(leaf) for leaf in leaves]
    if losses:
        torch.autograd.backward(losses)
