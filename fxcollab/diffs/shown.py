"""What prints itself by Rich, and as plain text in 80 columns."""

from __future__ import annotations

from abc import abstractmethod

from rich.console import Console, RenderableType


class Shown:
    """A value with a view for a terminal."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """The view for a terminal; `str` is the same in 80 columns, without colours."""

    def __str__(self) -> str:
        console = Console(width=80, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()
