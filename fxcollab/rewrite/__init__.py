"""Rewrite: duplicate what lies behind the splits and rescale what crosses."""

from fxcollab.rewrite.copying import private_copy
from fxcollab.rewrite.initialise import Init
from fxcollab.rewrite.rescale import rescale
from fxcollab.rewrite.rewrite import rewrite

__all__ = ["Init", "private_copy", "rescale", "rewrite"]
