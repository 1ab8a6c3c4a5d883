"""Capture: a model as a graph."""

from fxcollab.capture.capture import capture
from fxcollab.capture.interface import ExampleInputs
from fxcollab.capture.operators import INPLACE, stop_gradient

globals().update(INPLACE)  # generated code and pickled graphs name them fxcollab.capture.iadd and so on

__all__ = ["ExampleInputs", "capture", "stop_gradient"]
