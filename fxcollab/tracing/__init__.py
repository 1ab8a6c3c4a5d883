"""Capture: a model as a graph over its own modules."""
