"""Whether two models are training and inference model of one network."""

from __future__ import annotations

import inspect

from torch import fx, nn

from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import DiffError, FxCollabError
from fxcollab.fx_utils import first_difference
from fxcollab.plan import Plan
from fxcollab.tracing.capture import capture


def refuse_another(inference_model: nn.Module, captured: CollabGraphModule, plan: Plan) -> None:
    """Refuse an inference model that is not the captured original of a training model.

    Args:
        inference_model: a module, or what was pruned.
        captured: the training model's own inference graph.
        plan: the training model's.

    Raises:
        DiffError: graphs or state differ; with the first difference.
    """
    try:
        other = captured_like(inference_model, plan)
    except DiffError:
        raise
    except FxCollabError as error:
        raise _unrelated(" ".join(filter(None, (error.what, error.why)))) from error
    for training in (True, False):
        difference = first_difference(captured.modes.of(training), other.modes.of(training), annotations=False)
        if difference:
            raise _unrelated(f"in {'train' if training else 'eval'} mode {difference}")
    for difference in (_first_other_module(captured, other), _first_other_tensor(captured, other)):
        if difference:
            raise _unrelated(difference)


def captured_like(model: nn.Module, plan: Plan) -> CollabGraphModule:
    """A model captured as the original of a plan was.

    Raises:
        FxCollabError: it can't be.
    """
    parameters = inspect.signature(model.forward).parameters
    missing = [spec.name for spec in plan.interface.inputs if spec.name not in parameters]
    if missing and not isinstance(model, fx.GraphModule):
        raise _unrelated(f"its forward takes no {missing[0]!r}")
    return capture(model, plan.tree.splits, granularity=plan.granularity, interface=plan.interface)


def _first_other_module(one: CollabGraphModule, other: CollabGraphModule) -> str | None:
    """What is called under one name must be of one class, with the same options."""
    for graph in one.modes:
        for node in graph.find_nodes(op="call_module"):
            mine, theirs = (_described(module.get_submodule(str(node.target))) for module in (one, other))
            for left, right in zip(mine, theirs, strict=False):
                if left != right:
                    return f"in {node.target} {left} differs from {right}"
    return None


def _described(module: nn.Module) -> list[str]:
    """Path, class and options of a module and all inside."""
    return [
        f"{f'{path}: ' if path else ''}{type(part).__name__}({part.extra_repr()})"
        for path, part in module.named_modules()
    ]


def _first_other_tensor(one: CollabGraphModule, other: CollabGraphModule) -> str | None:
    mine, theirs = one.state_dict(), other.state_dict()
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if name not in mine or name not in theirs:
            return f"{name} is in one of them only"
        left, right = (f"shape {tuple(t.shape)} and type {t.dtype}" for t in (mine[name], theirs[name]))
        if left != right:
            return f"{name} has {left} in one and {right} in the other"
    return None


def _unrelated(why: str) -> DiffError:
    return DiffError(
        "These are not training and inference model of one network.",
        why=why,
        hint="give what prune returned, or the model that was transformed",
    )
