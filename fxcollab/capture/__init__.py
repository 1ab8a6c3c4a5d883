"""Capture: a model as a graph."""

from fxcollab.capture.capture import capture
from fxcollab.capture.interface import ExampleInputs

# Generated code and pickled graphs refer to these by their names here: ``fxcollab.capture.iadd``.
from fxcollab.capture.operators import (
    assume,
    iadd,
    iand,
    ifloordiv,
    ilshift,
    imatmul,
    imod,
    imul,
    ior,
    ipow,
    irshift,
    isub,
    itruediv,
    ixor,
    stop_gradient,
)

__all__ = [
    "ExampleInputs",
    "assume",
    "capture",
    "iadd",
    "iand",
    "ifloordiv",
    "ilshift",
    "imatmul",
    "imod",
    "imul",
    "ior",
    "ipow",
    "irshift",
    "isub",
    "itruediv",
    "ixor",
    "stop_gradient",
]
