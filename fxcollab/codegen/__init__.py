"""Graphs become a module with a readable forward over the caller's own modules and state."""
