"""The graphs of train and eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx, nn

from fxcollab.fx_utils import copy_graph, first_difference


@dataclass(frozen=True, eq=False)
class Modes:
    """The graph of train mode and that of eval mode; the same object where they don't differ."""

    train: fx.Graph
    eval: fx.Graph

    @classmethod
    def merged(cls, train: fx.Graph, evaluation: fx.Graph) -> Modes:
        """Both modes, with one graph where they are equal node for node."""
        return cls(train, train if first_difference(train, evaluation) is None else evaluation)

    @classmethod
    def of_graph_module(cls, model: fx.GraphModule) -> Modes:
        """Copies of the graphs that a module, whose ``train()`` may replace its graph, has in the two modes."""
        graphs = []
        for training in (True, False):
            with in_mode(model, training):
                graphs.append(copy_graph(model.graph))
        return cls.merged(*graphs)

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


@contextmanager
def in_mode(root: nn.Module, mode: bool) -> Iterator[None]:
    """A context in which ``root`` is in a mode; afterwards all its modules are in the mode in which they were."""
    before, flags = root.training, [(module, module.training) for module in root.modules()]
    try:
        set_mode(root, mode)
        yield
    finally:
        set_mode(root, before)
        for module, flag in flags:
            module.__dict__["training"] = flag


def set_mode(root: nn.Module, mode: bool) -> None:
    """Set the mode by the model's own ``train()``, which may keep parts in eval mode."""
    try:
        root.train(mode)
    except NotImplementedError:  # by exported modules, whose graph has one mode
        nn.Module.train(root, mode)
