"""Capture: a model as a graph."""

from fxcollab.capture.capture import capture
from fxcollab.capture.interface import ExampleInputs

__all__ = ["ExampleInputs", "capture"]
