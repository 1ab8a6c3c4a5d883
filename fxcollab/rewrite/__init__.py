"""Rewrite: duplicate what lies behind the splits and rescale what crosses."""

from fxcollab.rewrite.initialise import Init
from fxcollab.rewrite.rewrite import rewrite

__all__ = ["Init", "rewrite"]
