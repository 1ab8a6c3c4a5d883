"""Lists and dicts that several calls are handed: each sees what the others write into it."""

from __future__ import annotations

from typing import Any

from torch import fx

SHARES_LISTS = "fxcollab_shares_lists"
"""Meta key: whether the call is handed a list or dict that other calls are handed, too."""


class SharedArguments:
    """The lists and dicts that calls were handed, and the nodes of these calls."""

    def __init__(self) -> None:
        self._handed: dict[int, tuple[Any, list[fx.Node]]] = {}

    def note(self, call: fx.Node, given: Any) -> None:
        """Mark calls that are handed the same list or dict as others."""
        if isinstance(given, list | dict):
            _, calls = self._handed.setdefault(id(given), (given, []))
            calls.append(call)
            for each in calls if len(calls) > 1 else ():
                each.meta[SHARES_LISTS] = True
        if isinstance(given, list | dict | tuple):
            for part in given.values() if isinstance(given, dict) else given:
                self.note(call, part)
