"""A training model as transformers has its models: labels go in, the loss comes out (extra ``transformers``).

model = with_loss(fxcollab.transform(model, splits=..., example_inputs=...), fxcollab.CollaborativeLoss())
"""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from fxcollab._torch import storage_id
from fxcollab.errors import CaptureError, ObjectiveError, StateError
from fxcollab.objectives.objective import Objective
from fxcollab.plan import plan_of, training_model


def with_loss(train_model: nn.Module, loss: Objective) -> nn.Module:
    """The training model with the loss inside, for ``transformers.Trainer`` and loops that read ``outputs.loss``.

    In train mode it returns head 0's output with the total of all heads as ``loss``; in eval mode what the original
    does. Its checkpoints hold all heads; ``fxcollab.original(model).save_pretrained(folder)`` saves head 0.

    Args:
        train_model: of a model that takes ``labels``. ``example_inputs`` must have had all other inputs of the data.
        loss: of the heads' outputs and ``labels``. Label smoothing is its option, not ``label_smoothing_factor``.

    Raises:
        StateError: eval mode returns more than head 0's output.
    """
    if plan_of(training_model(train_model)).options.eval_output != "head":
        raise StateError(
            "The training model returns more than head 0's output in eval mode.",
            why="The loss and the figures of an evaluation are those of the original.",
            hint="transform(..., eval_output='head'); fxcollab.all_heads(model) gives the outputs of all heads",
        )
    original = type(training_model(train_model).root)
    own = signature(original.forward)

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        return self.call(**dict(zip(list(own.parameters)[1:], args, strict=False)), **inputs)

    forward.__signature__ = own  # type: ignore[attr-defined]  # the Trainer reads it
    counts = any(each.kind is Parameter.VAR_KEYWORD for each in own.parameters.values())
    made: nn.Module = type(original.__name__, (_WithLoss,), {"forward": forward, "counts": counts})(train_model, loss)
    return made.train(train_model.training)


class _WithLoss(nn.Module):
    accepts_loss_kwargs = True  # num_items_in_batch, which the original takes if it ``counts``

    def __init__(self, train_model: nn.Module, loss: Objective) -> None:
        super().__init__()
        self.train_model, self.loss = train_model, loss
        self.inputs = tuple(signature(train_model.forward).parameters)
        self.register_state_dict_post_hook(_without_shared_memory)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(super().__getattr__("train_model"), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return with_loss, (self.train_model, self.loss)

    def call(self, *, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        own = training_model(self.train_model)
        if own.returns_all:
            return self.train_model(**inputs)
        if not self.training:
            items = {"num_items_in_batch": num_items_in_batch} if self.counts else {}
            return own.own_root()(**inputs, labels=labels, **items)
        if labels is None:
            hint = "instead of label_smoothing_factor give the loss hard=nn.CrossEntropyLoss(label_smoothing=0.1)"
            raise ObjectiveError("There are no labels to learn from.", hint=hint)
        if unknown := ", ".join(name for name in inputs if name not in self.inputs):
            what = f"The training model has no input {unknown}, only {', '.join(self.inputs)}."
            raise CaptureError(what, hint=f"give {unknown} in the example_inputs of transform, too")
        heads = self.train_model(**inputs, **({"labels": labels} if "labels" in self.inputs else {}))
        total = self.loss(heads, labels, num_items=num_items_in_batch)
        first = heads[0]
        return type(first)(**{**first, "loss": total}) if isinstance(first, dict) else (total, *first)


def _without_shared_memory(_: nn.Module, state: dict[str, Any], *args: Any) -> None:
    """Copy what is in the state twice: safetensors, which the Trainer writes, has no ties."""
    first = {storage_id(tensor): name for name, tensor in reversed(state.items()) if isinstance(tensor, Tensor)}
    state |= {name: state[name].clone() for name in state.keys() - first.values() if isinstance(state[name], Tensor)}
