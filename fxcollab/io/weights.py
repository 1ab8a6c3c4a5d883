"""Weights as safetensors: every tensor once, under all its names."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxcollab._torch import storage_id
from fxcollab.errors import ArtifactError
from fxcollab.io.folder import beside

_ALIASES, _ORDER = "fxcollab.aliases", "fxcollab.order"


def save_state_dict(state: Mapping[str, Any], file: Path, *, aliases: bool = False) -> None:
    """Write tensors to a safetensors file.

    With ``aliases`` a tensor under several names is stored once, with its other names in the metadata, which only
    `load_state_dict` reads; else every name gets a copy, for any reader.

    Raises:
        ArtifactError: a value is not a tensor, has no values, or is of a kind that safetensors doesn't support.
    """
    first: dict[tuple[Any, ...], str] = {}
    unique: dict[str, Tensor] = {}
    other_names: dict[str, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        tensor = _checked(name, value).detach()
        storage = storage_id(tensor)
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if aliases and tensor.numel() and key in first:
            other_names[name] = first[key]
        else:
            first[key] = name
            shared = storage in storages  # safetensors takes every storage once
            unique[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
            storages.add(storage)
    metadata = {"format": "pt", _ORDER: json.dumps(list(state))}
    if other_names:
        metadata[_ALIASES] = json.dumps(other_names)
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    try:
        save_file(unique, file, metadata)
    except (ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError("The state can't be written as safetensors.", why=str(error)) from error
    file.chmod(mode)  # the umask's, which the writer does not follow


def load_state_dict(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file under all their names, in the order they were saved in.

    Raises:
        ArtifactError: the file is missing, damaged, or of another kind.
    """
    path = Path(file)
    if not path.is_file():
        raise ArtifactError("There is no weights file.", where=str(path))
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        aliases = dict(json.loads(metadata.get(_ALIASES, "{}")))
        order = list(json.loads(metadata.get(_ORDER, "[]"))) or list(tensors)
        return {name: tensors[aliases.get(name, name)] for name in order}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            "The weights file can't be read.",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            hint="weights are safetensors files; a checkpoint of torch.save: fxcollab.prune_state_dict("
            "torch.load(file, weights_only=True))",
        ) from error


def refuse_existing_file(file: Path, force: bool) -> None:
    """Raise an `ArtifactError` where the output file exists and may not be replaced."""
    if file.is_dir():
        raise ArtifactError(
            "The output is a directory.", where=str(file), hint=f"name a file: {file}/weights.safetensors"
        )
    if file.exists() and not force:
        raise ArtifactError(
            "The output file exists.", where=str(file), hint="give another one, or force=True (--force)"
        )


def write_state_dict(state: Mapping[str, Any], file: Path, *, force: bool = False) -> None:
    """Write a state dict to a file that appears whole or not at all and that any safetensors reader reads.

    Raises:
        ArtifactError: the file exists and ``force`` is not given, or a value is not a tensor with values.
    """
    refuse_existing_file(file, force)
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = beside(file)
    try:
        save_state_dict(state, draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _checked(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ArtifactError(
            f"State {name!r} is a {type(value).__qualname__}, not a tensor.",
            why="safetensors files hold tensors only, and fxcollab writes no pickle",
        )
    if value.layout is not torch.strided:
        raise ArtifactError(
            f"State {name!r} is a {value.layout} tensor.", why="safetensors files hold dense tensors only"
        )
    if value.is_meta:
        raise ArtifactError(
            f"State {name!r} has no values.",
            why="it is on the meta device",
            hint="give the training model values first, as with train_model.to_empty(device='cpu') and a checkpoint",
        )
    return value
