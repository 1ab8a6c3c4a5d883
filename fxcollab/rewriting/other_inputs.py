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
from fxcollab.tracing.capture import CAPTURE_KEY, CaptureOptions
from fxcollab.tracing.interface import Interface

OTHER_INPUTS_KEY = "fxcollab_other_inputs"


@dataclass(frozen=True)
class OtherInputs:
    """Calls the original's forward in the place of a graph that has the given fingerprint."""

    interface: Interface
    fingerprint: str

    def __call__(self, module: CollabGraphModule, values: Sequence[Any], error: GuardError) -> Any:
        """What the original returns; ``error`` is raised if the graph was edited, since its forward was not."""
        if fingerprint([module.graph]) != self.fingerprint:
            raise error
        args, kwargs = self.interface.call(module.root, values)
        return module.own_root().forward(*args, **kwargs)


def other_inputs(captured: CollabGraphModule, observation: Observation) -> OtherInputs | None:
    """How eval mode computes other inputs; None where it has no guards, or has written something before the last."""
    graph, options = captured.modes.eval, captured.meta[CAPTURE_KEY]
    assert isinstance(options, CaptureOptions)
    alone = Observation(observation.evaluation)
    tracked = (node for node in graph.nodes if node.op in ("placeholder", "get_attr"))
    written = {write.node for write in track_storages(graph, alone, tracked).writes}
    before = dropwhile(lambda node: node.target is not guard, reversed(graph.nodes))
    if options.fingerprint is None or any(node in written or alone.of(node).changes for node in before):
        return None
    return OtherInputs(options.interface, options.fingerprint)
