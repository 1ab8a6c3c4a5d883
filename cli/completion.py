"""Completion of SOURCE: libraries' models by the names in their files, since importing them takes seconds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_LIBRARIES = ("torchvision", "timm")
_REGISTERED = re.compile(r"^@register_model\b(?:\(name=\"(\w+)\"\))?.*?^def (\w+)", re.MULTILINE | re.DOTALL)


def sources(incomplete: str) -> list[str]:
    """What SOURCE may go on with; nothing for files, which shells complete themselves."""
    library, colon, _ = incomplete.partition(":")
    if not colon:
        return [f"{name}:" for name in (*_LIBRARIES, "hf") if incomplete and name.startswith(incomplete)]
    found = importlib.util.find_spec(library) if library in _LIBRARIES else None
    if found is None or found.origin is None:
        return []
    files = (Path(found.origin).parent / "models").rglob("*.py")
    registered = (pair for file in files for pair in _REGISTERED.findall(file.read_text("utf-8", "replace")))
    names = {given or function for given, function in registered}
    return sorted(full for name in names if (full := f"{library}:{name}").startswith(incomplete))
