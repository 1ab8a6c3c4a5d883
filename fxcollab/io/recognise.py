"""Recognise what fxcollab wrote, by its content: the files of an artifact, one head's weights, views of a diff."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fxcollab.io.mark import is_marked

PLAN, WEIGHTS, GRAPH, PAGE = "plan.json", "weights.safetensors", "graph.py", "diff.html"
CHECKSUM, SIGNATURE = "checksum", "signature"
"""Entries of a plan: of the other entries, and this account's keyed hash."""
ORDER, KIND, SEAL = "fxcollab.order", "fxcollab.kind", "fxcollab.seal"
"""Entries of the metadata of weights; the kind is ``head`` for what `prune` writes, the seal the file's checksum."""
NO_SEAL = "0" * 64
"""What the seal is while the checksum is computed."""
_SEAL = re.compile(rb'(?<!\\)"fxcollab\.seal":"([0-9a-f]{64})"')
MOST_PLAN_BYTES, MOST_GENERATED_BYTES = 1 << 24, 1 << 28
_MOST_HEADER_BYTES, _MOST_SEALED_BYTES = 1 << 25, 1 << 27  # read as JSON; safetensors writes no longer ones


def _is_plan(file: Path) -> bool:
    data = _json(_bytes(file, MOST_PLAN_BYTES))
    entries = {"format", "fxcollab", "fingerprint", CHECKSUM}
    with suppress(RecursionError):  # of what is nested deeply
        return isinstance(data, dict) and entries <= data.keys() and data[CHECKSUM] == checksum_of(data)
    return False


def checksum_of(plan: Mapping[str, Any]) -> str:
    """The checksum of a plan's JSON data, but for the source, on which nothing but the code depends, and itself."""
    rest = {key: value for key, value in plan.items() if key not in ("source", CHECKSUM, SIGNATURE)}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_weights(file: Path, head: bool = False) -> bool:
    metadata = weights_header(file).get("__metadata__")
    is_kind = isinstance(metadata, dict) and ORDER in metadata and (metadata.get(KIND) == "head") is head
    return is_kind and is_sealed(file)


def seal(file: Path) -> None:
    """Write the checksum of new weights into their header."""
    found = _seal_of(file)
    assert found is not None
    place, _, computed = found
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(computed.encode())


def is_sealed(file: Path) -> bool:
    """Whether weights are as they were written."""
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return False
        found = _seal_of(file)
    except OSError:
        return False
    return found is not None and found[1] == found[2]


def _seal_of(file: Path) -> tuple[int, str, str] | None:
    """Where the seal of weights is, what it says, and what it should say."""
    with file.open("rb") as opened:
        length = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(0)
        header = opened.read(min(length, _MOST_SEALED_BYTES))
        match = _SEAL.search(header)
        if match is None:
            return None
        digest = hashlib.sha256(header[: match.start(1)] + NO_SEAL.encode() + header[match.end(1) :])
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return match.start(1), match[1].decode(), digest.hexdigest()


def is_generated(file: Path) -> bool:
    """Whether this is a view of a diff, or a graph's code, and as it was written."""
    return is_marked(_bytes(file, MOST_GENERATED_BYTES))


def is_head(file: Path) -> bool:
    """Whether these are weights that `prune` wrote."""
    return _is_weights(file, head=True)


FILES: dict[str, Callable[[Path], bool]] = {
    PLAN: _is_plan,
    WEIGHTS: _is_weights,
    GRAPH: is_generated,
    PAGE: is_generated,
}
"""What an artifact's folder may hold and ``force`` may replace, with how each is recognised."""


def weights_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: names, types and shapes; empty where the file has none."""
    size = _bytes(file, 8)
    length = int.from_bytes(size, "little") if len(size) == 8 else 0
    data = _json(_bytes(file, 8 + length)[8:]) if length <= _MOST_HEADER_BYTES else None
    return data if isinstance(data, dict) else {}


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _bytes(file: Path, count: int) -> bytes:
    """The first bytes of a regular file; none of anything else, which is not even opened."""
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return b""
        with file.open("rb") as opened:
            return opened.read(count)
    except (OSError, ValueError):
        return b""
