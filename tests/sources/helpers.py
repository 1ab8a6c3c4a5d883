"""Model files, and what loading them gives or refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fxcollab.errors import SourceError
from fxcollab.sources.load import load as load_source
from fxcollab.sources.loaded import Loaded
from fxcollab.sources.source import Source

Write = Callable[..., Path]

NET = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=3):
            super().__init__()
            self.linear = nn.Linear(width, 2)
"""
BLOCK = """
    class Block(nn.Module):
        def __init__(self, channels, stride):
            super().__init__()
            self.linear = nn.Linear(channels, stride)
"""


def load(text: object, **arguments: object) -> Loaded:
    return load_source(Source.parse(str(text), arguments))  # type: ignore[arg-type]


def refusal(text: object, **arguments: object) -> SourceError:
    path = list(sys.path)
    with pytest.raises(SourceError) as caught:
        load(text, **arguments)
    assert sys.path == path
    return caught.value


def line_of(path: Path, text: str) -> str:
    number = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)
    return f"{path}:{number}"
