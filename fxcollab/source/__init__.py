"""Sources: where models come from, as text and as plain data."""

from fxcollab.source.loaded import Loaded
from fxcollab.source.source import Source, parse_argument, source_of

__all__ = ["Loaded", "Source", "parse_argument", "source_of"]
