"""Run a training graph so that every head draws the random numbers that the original would draw alone.

In the training graph the instances of one node draw one after the other. To compare a head with an original bit for
bit, each instance starts from the generator state in which the original's node starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcollab._torch import pytree, version_of
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.deep_copy import clone_of, deep_copy
from fxcollab.errors import StateError
from fxcollab.fx_utils import Interpreter
from fxcollab.plan import plan_of
from fxcollab.provenance import provenance_of
from fxcollab.rewriting.prune import prune
from fxcollab.rng import GeneratorState, preserve_rng_state


class Lockstep(Interpreter):
    """Runs a training model node by node.

    All instances of a node draw the numbers that the original's node draws; with ``together=False`` they draw one
    after the other, as the generated code does.

    Attributes:
        hazards: writes of one branch into values that another one reads, which `run` found.
        draws: whether the original draws random numbers; known after `run` with ``together``.
    """

    def __init__(self, model: CollabGraphModule, *, together: bool = True) -> None:
        super().__init__(model)
        self.hazards: list[str] = []
        self.draws = False
        self._model, self._together = model, together
        self._provenance = provenance_of(model.graph, plan_of(model).options.peers)
        self._starts: dict[str, GeneratorState] = {}
        self._versions: dict[fx.Node, list[int]] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}

    def run(self, *inputs: Any) -> Any:  # type: ignore[override]
        """The tuple of outputs."""
        self._starts = _starts(self._model, inputs) if self._together else {}
        self.draws = bool(self._starts)
        return super().run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        """Also restore the generators, and compare the versions of values that cross into branches."""
        own = self._provenance[n]
        if not own.inserted and n.op.startswith("call") and own.origin in self._starts:
            self._starts[own.origin].restore()
        for source in n.all_input_nodes:
            for writer in self._writers.get(source, ()):
                branch = self._provenance[writer].branch
                if own.branch[: len(branch)] != branch:
                    self.hazards.append(f"{writer.name} writes into {source.name}, which {n.name} reads")
        result = super().run_node(n)
        for source, versions in self._versions.items():
            if source in self.env and (now := _versions(self.env[source])) != versions:
                self._versions[source] = now
                self._writers.setdefault(source, []).append(n)
        if n.op != "get_attr" and any(len(self._provenance[user].branch) > len(own.branch) for user in n.users):
            self._versions[n] = _versions(result)
        return result


def cloned(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The inputs for one run, which may write into them; gradients reach the given ones."""
    return tuple(pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, list(inputs)))


def _versions(value: Any) -> list[int]:
    tensors = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    return [version_of(tensor) for tensor in tensors]


def _starts(model: CollabGraphModule, inputs: Sequence[Any]) -> dict[str, GeneratorState]:
    """The state of the generators before each node of the original, a copy of which runs once.

    Empty where it draws no numbers.
    """
    try:
        original = deep_copy(prune(model), clone_of)[0]
    except StateError:  # the heads are no longer apart, which the check of the structure reports
        return {}
    starts: dict[str, GeneratorState] = {}
    with preserve_rng_state(), torch.no_grad():
        before = _State()
        _Hooked(original, lambda node: starts.update({node.name: GeneratorState()})).run(*cloned(inputs))
        return starts if before.numbers_were_drawn() else {}


class _State(GeneratorState):
    def numbers_were_drawn(self) -> bool:
        """Whether any generator was drawn from since."""
        now = GeneratorState()
        devices = zip((self._cpu, *self._cuda), (now._cpu, *now._cuda), strict=False)
        return self.foreign_numbers_were_drawn() or not all(torch.equal(one, other) for one, other in devices)


class _Hooked(Interpreter):
    """Calls ``before`` with every node that is about to run."""

    def __init__(self, model: fx.GraphModule, before: Callable[[fx.Node], None]) -> None:
        super().__init__(model)
        self._before = before

    def run_node(self, n: fx.Node) -> Any:
        self._before(n)
        return super().run_node(n)
