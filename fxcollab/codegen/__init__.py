"""Codegen: graphs become a module with a readable forward over the caller's own modules and state."""

from fxcollab.codegen.modes import Modes, put_in_mode
from fxcollab.codegen.module import CollabGraphModule, Recompute

__all__ = ["CollabGraphModule", "Modes", "Recompute", "put_in_mode"]
