"""Why costs can't be counted."""

from __future__ import annotations

from torch import nn

from fxcollab.capture.examples import UNTOLD, why_not
from fxcollab.capture.interface import Interface
from fxcollab.capture.preserve import preserved
from fxcollab.codegen import put_in_mode
from fxcollab.errors import CaptureError


def uncountable(model: nn.Module, interface: Interface, error: Exception) -> Exception:
    """What to raise where ``error`` came up while counting: in words, if the reason is known."""
    name = type(model).__qualname__
    if isinstance(error, UNTOLD):
        return CaptureError(
            f"What {name} costs can't be counted.",
            where=f"{name}.forward",
            why=f"it asks for the data themselves, and fake tensors have none: {error}",
            hint="name the splits yourself",
        )
    with preserved(list(model.modules())):
        put_in_mode(model, True)
        reason = why_not(model, interface)
    if reason is None:
        return error
    shapes = ", ".join("x".join(map(str, spec.shape or ())) for spec in interface.inputs)
    return CaptureError(
        f"{name} fails on input {shapes}.",
        where=f"{name}.forward, in train mode",
        why=reason,
        hint="give what the model takes: example_inputs=(torch.randn(1, 3, 224, 224),) or --input 1x3x224x224",
    )
