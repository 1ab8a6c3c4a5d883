"""Whose code a plan runs: a keyed hash tells what this user wrote on this account; anything else is asked for."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from fxcollab.errors import SourceError, TrustError, one_paragraph, warn_caller
from fxcollab.io.recognise import CHECKSUM, PLAN, SIGNATURE, WEIGHTS, checksum_of
from fxcollab.io.weights import refuse_other_tensors
from fxcollab.sources.load import load
from fxcollab.sources.source import Source

_KEY_BYTES = 32
_MOST_OF_PLACE, _MOST_OF_VALUE = 300, 100  # characters, of what is shown
_VERBS = {
    "file": "execute", "module": "import", "hf": "load with transformers", "timm": "build with timm",
    "torchvision": "build with torchvision",
}  # fmt: skip


def signed(data: Mapping[str, Any], source: Source | None) -> dict[str, Any]:
    """The plan's JSON data with their checksum and, where the source needs it, this account's keyed hash."""
    sealed = {**data, CHECKSUM: checksum_of(json.loads(json.dumps(data)))}
    if source is None:
        return sealed
    try:
        return {**sealed, SIGNATURE: _signature(_key(make=True), sealed, source)}
    except (OSError, RuntimeError) as error:
        if not _is_name_of_library(source):
            warn_caller(f"the plan is not marked as this account's ({error}): loading it will need trust_source=True")
        return sealed


def refuse_strangers_code(
    data: Mapping[str, Any], source: Source, folder: Path, trust: bool, weights: Path | None = None
) -> None:
    """Raise where loading a source runs code of someone else's choice, or takes more memory than its weights do.

    Args:
        data: the plan's JSON data.
        source: of the plan.
        folder: of the plan.
        trust: whether the source is trusted, whoever wrote the plan.
        weights: what will be loaded, by default the folder's own.

    Raises:
        TrustError: it does; the error says what would run.
        SourceError: the code isn't there.
        MixedError: a stranger's plan names a model of a library of which the weights are not.
    """
    if trust or is_own(data, source):
        return
    if _is_name_of_library(source) and not data.get("fixed"):
        with torch.device("meta"):
            state = load(source).model.state_dict(keep_vars=True)
        refuse_other_tensors(weights or folder / WEIGHTS, state, str(data.get("peers")))
        return
    why = "this account did not write it as it is, or its code lay elsewhere then"
    if _place(source) is None:
        place = Path(source.location)
        raise SourceError(f"there is no file {place.name}", where=str(place.parent), hint="give the model itself")
    hint = "read that code, then trust it: trust_source=True (--trust-source)"
    if source.kind == "module" and _place(source) == source.location:
        why = "its module is in no folder of sys.path, so that it can't be told whether this account wrote the plan"
        hint = f"run this where the module lies, or set PYTHONPATH; of a plan that you didn't write, {hint}"
    shown = ([_shortened(text, _MOST_OF_VALUE) for text in (name, repr(value))] for name, value in source.arguments)
    arguments = ", ".join(map("=".join, shown))
    call = one_paragraph(f"{_shortened(str(source), _MOST_OF_PLACE)}, with arguments ({arguments})")
    raise TrustError(
        "Loading this plan would run code that a stranger may have chosen.",
        where=str(folder / PLAN),
        why=f"{why}; it would {_VERBS[source.kind]} {call}",
        hint=f"{hint}; or give the model itself: fxcollab.load(directory, model)",
    )


def _shortened(text: str, most: int) -> str:
    """With its middle left out where it is long: a file's name and an object's stand at the end."""
    return text if len(text) <= most else f"{text[: most // 3]} ... {text[-2 * most // 3 :]}"


def is_own(data: Mapping[str, Any], source: Source) -> bool:
    """Whether this account wrote a plan as it is, beside the code that is there."""
    with suppress(OSError, RuntimeError):
        return hmac.compare_digest(ascii(data.get(SIGNATURE)), repr(_signature(_key(make=False), data, source)))
    return False


def _is_name_of_library(source: Source) -> bool:
    """Whether it is the name of a model of torchvision or timm alone: one argument could take all memory."""
    return source.kind in ("torchvision", "timm") and not source.arguments


def _signature(key: bytes, data: Mapping[str, Any], source: Source) -> str:
    """Holds for one place of the code: a copy of the plan beside other code is another's plan."""
    signed = json.dumps([data.get(CHECKSUM), data.get("source"), _place(source)], sort_keys=True)
    return hmac.new(key, signed.encode(), "sha256").hexdigest()


def _place(source: Source) -> str | None:
    """Where the code of a source lies; found without running any. None where a file isn't there.

    Only folders are searched: other ways of finding modules, such as those of packages that are installed to be
    edited, may run code. What they find is known by its name alone.
    """
    if source.kind == "file":
        return source.location if os.path.exists(source.location) else None  # noqa: PTH110 (answers for any text)
    if source.kind != "module":
        return source.location
    top = source.location.partition(".")[0]
    spec, module = PathFinder.find_spec(top, [str(Path.cwd()), *sys.path]), sys.modules.get(top)
    if spec is None:
        return source.location
    file = getattr(module, "__file__", None) if module else spec.origin
    folders = getattr(module, "__path__", ()) if module else spec.submodule_search_locations or ()
    return os.path.realpath(file) if file else "\0".join(map(os.path.realpath, folders))


def _key(make: bool) -> bytes:
    """The key of this account.

    Raises:
        OSError: there is none and none can be made, or others may read or replace it.
    """
    home = os.environ.get("XDG_STATE_HOME", "")
    own = Path("~/.local/state").expanduser() if os.environ.get("HOME", "~") else Path()  # an empty one is no root
    folder = (Path(home) if os.path.isabs(home) else own) / "fxcollab"  # noqa: PTH117
    if not folder.is_absolute():
        raise OSError(f"{folder} has no fixed place: HOME is not a full path")
    file = folder / "key"
    if make and not file.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = folder / f"key.{secrets.token_hex(8)}"
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:  # noqa: PTH123
                opened.write(secrets.token_bytes(_KEY_BYTES))
            with suppress(FileExistsError):  # another process made it meanwhile
                os.link(draft, file)
        finally:
            draft.unlink(missing_ok=True)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(file, flags), "rb") as opened:  # noqa: PTH123
        of = os.fstat(opened.fileno())
        mine = not hasattr(os, "geteuid") or (of.st_uid == os.geteuid() and not of.st_mode & 0o077)
        key = opened.read(_KEY_BYTES + 1) if stat.S_ISREG(of.st_mode) else b""
    if not mine or len(key) != _KEY_BYTES:
        raise OSError(f"{file} is damaged, or not this user's alone: delete it, and a new one is made")
    return key
