"""Codegen: graphs become a module with a readable forward over the caller's own modules and state."""

from fxcollab.codegen.branches import Recompute, check_recompute
from fxcollab.codegen.modes import Modes, put_in_mode
from fxcollab.codegen.module import CollabGraphModule

__all__ = ["CollabGraphModule", "Modes", "Recompute", "check_recompute", "put_in_mode"]
