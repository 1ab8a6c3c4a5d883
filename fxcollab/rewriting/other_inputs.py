"""Inputs for which a forward takes a different branch than when it was captured: in eval mode the original's runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from fxcollab.analysis.effects import Observation
from fxcollab.analysis.storages import track_storages
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import GuardError
from fxcollab.fingerprint import fingerprint
from fxcollab.runtime.operators import guard
from fxcollab.tracing.capture import CAPTURE_KEY
from fxcollab.tracing.interface import Interface

OTHER_INPUTS_KEY = "fxcollab_other_inputs"


@dataclass(frozen=True)
class OtherInputs:
    """Calls the original's forward in the place of a graph that has the given fingerprint.

    By then the modules ``before`` the last guard have run: they must not have changed anything.
    """

    interface: Interface
    fingerprint: str
    before: tuple[str, ...]

    def __call__(self, module: CollabGraphModule, values: Sequence[Any], error: GuardError) -> Any:
        """What the original returns; ``error`` is raised if the graph was edited, or running it twice may tell."""
        run = (part for path in self.before for part in module.get_submodule(path).modules())
        if any(part.training or part._forward_hooks or part._forward_pre_hooks for part in run):
            raise error
        if fingerprint([module.graph]) != self.fingerprint:
            raise error
        args, kwargs = self.interface.call(module.root, values)
        return module.own_root().forward(*args, **kwargs)


def other_inputs(captured: CollabGraphModule, observation: Observation) -> OtherInputs | None:
    """How eval mode computes other inputs.

    None where it has no guards, where something before the last one writes or draws random numbers, where attributes
    change, and for a model object with a forward of its own, which knows no other heads.
    """
    graph, options = captured.modes.eval, captured.meta[CAPTURE_KEY]
    alone = Observation(observation.evaluation)
    tracked = (node for node in graph.nodes if node.op in ("placeholder", "get_attr"))
    written = {write.node for write in track_storages(graph, alone, tracked).writes}
    before = list(dropwhile(lambda node: node.target is not guard, reversed(graph.nodes)))
    if options.fingerprint is None or observation.counts or "forward" in vars(captured.root):
        return None
    if any(node in written or alone.of(node).changes or alone.of(node).random for node in before):
        return None
    called = tuple(str(node.target) for node in before if node.op == "call_module")
    return OtherInputs(options.interface, options.fingerprint, called)
