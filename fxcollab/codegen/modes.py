"""The graphs of train and eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from fxcollab.fx_utils import first_difference


@dataclass(frozen=True, eq=False)
class Modes:
    """The graph of train mode and that of eval mode; the same object where they don't differ."""

    train: fx.Graph
    eval: fx.Graph

    @classmethod
    def merged(cls, train: fx.Graph, evaluation: fx.Graph) -> Modes:
        """Both modes, with one graph where they are equal node for node."""
        return cls(train, train if first_difference(train, evaluation) is None else evaluation)

    @property
    def differ(self) -> bool:
        """Whether the structure depends on the mode."""
        return self.train is not self.eval

    def map(self, function: Callable[[fx.Graph], fx.Graph]) -> Modes:
        """``function`` of each graph, called once where both modes share one."""
        train = function(self.train)
        return Modes(train, function(self.eval) if self.differ else train)

    def of(self, training: bool) -> fx.Graph:
        """The graph of one mode."""
        return self.train if training else self.eval

    def __iter__(self) -> Iterator[fx.Graph]:
        """The distinct graphs."""
        return iter((self.train, self.eval) if self.differ else (self.train,))


def set_mode(root: nn.Module, mode: bool) -> None:
    """Set the mode by the model's own ``train()``, which may keep parts in eval mode."""
    try:
        root.train(mode)
    except NotImplementedError:  # by exported modules, whose graph has one mode
        nn.Module.train(root, mode)
