"""Whether two models are training and inference model of one network."""

from __future__ import annotations

import inspect

from torch import Tensor, fx, nn

from fxcollab.capture import capture
from fxcollab.codegen import CollabGraphModule
from fxcollab.errors import DiffError, FxCollabError
from fxcollab.graphs import first_difference
from fxcollab.plan import PLAN_KEY, Plan
from fxcollab.prune import prune


def refuse_another(inference_model: nn.Module, captured: CollabGraphModule, plan: Plan) -> None:
    """Refuse an inference model that is not the captured original of a training model.

    Args:
        inference_model: a module, what was pruned, or another training model of the same network.
        captured: the training model's own inference graph.
        plan: the training model's.

    Raises:
        DiffError: graphs or state differ; with the first difference.
    """
    try:
        other = _captured(inference_model, plan)
    except DiffError:
        raise
    except FxCollabError as error:
        raise _unrelated(" ".join(filter(None, (error.what, error.why)))) from error
    for training in (True, False):
        difference = first_difference(captured.modes.of(training), other.modes.of(training))
        if difference:
            raise _unrelated(f"in {'train' if training else 'eval'} mode {difference}")
    difference = _first_other_tensor(captured.state_dict(), other.state_dict())
    if difference:
        raise _unrelated(difference)


def _captured(model: nn.Module, plan: Plan) -> CollabGraphModule:
    if isinstance(model, CollabGraphModule) and PLAN_KEY in model.meta:
        return prune(model)
    parameters = inspect.signature(model.forward).parameters
    missing = [spec.name for spec in plan.interface.inputs if spec.name not in parameters]
    if missing and not isinstance(model, fx.GraphModule):
        raise _unrelated(f"its forward takes no {missing[0]!r}")
    return capture(model, plan.tree.splits, granularity=plan.granularity, interface=plan.interface)


def _first_other_tensor(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other:
            return f"{name} is in one of them only"
        if one[name].shape != other[name].shape:
            return f"{name} has shape {tuple(one[name].shape)} in one and {tuple(other[name].shape)} in the other"
    return None


def _unrelated(why: str) -> DiffError:
    return DiffError(
        "These are not training and inference model of one network.",
        why=why,
        hint="give what prune returned, or the model that was transformed",
    )
