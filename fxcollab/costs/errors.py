"""Why costs can't be counted."""

from __future__ import annotations

from torch import nn

from fxcollab._torch import DATA_DEPENDENT_ERRORS
from fxcollab.codegen.modes import set_mode
from fxcollab.errors import CaptureError
from fxcollab.tracing.examples import why_not
from fxcollab.tracing.interface import Interface
from fxcollab.tracing.preserve import preserved


def uncountable(model: nn.Module, interface: Interface, error: Exception) -> Exception:
    """What to raise where ``error`` came up while counting: in words, if the reason is known."""
    name = type(model).__qualname__
    if isinstance(error, DATA_DEPENDENT_ERRORS):
        return CaptureError(
            f"What {name} costs can't be counted.",
            where=f"{name}.forward",
            why=f"it asks for the data themselves, and fake tensors have none: {error}",
            hint="name the splits yourself",
        )
    with preserved(list(model.modules())):
        set_mode(model, True)
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
