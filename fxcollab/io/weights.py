"""Weights as safetensors: every tensor once, under all its names."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxcollab._torch import storage_id
from fxcollab.errors import ArtifactError, DamagedError, MixedError, OutputError
from fxcollab.io.files import only, refuse_existing_file, written
from fxcollab.io.recognise import KIND, NO_SEAL, ORDER, PLAN, SEAL, WEIGHTS, is_head, seal, weights_header
from fxcollab.limits import check_memory
from fxcollab.rewriting.state_dict import unwrapped
from fxcollab.tree import HeadTree, branch_name

_ALIASES, _HEADER = "fxcollab.aliases", "__metadata__"
_BY_TORCH = (
    "keep such state by torch.save(train_model.state_dict(), FILE), or make it a buffer of another kind or name"
)


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
    copied = 0
    for name, value in state.items():
        tensor = _checked(name, value).detach().resolve_conj().resolve_neg()  # files have the bytes alone
        storage = storage_id(tensor)
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if aliases and tensor.numel() and key in first:
            other_names[name] = first[key]
        else:
            first[key] = name
            shared = storage in storages  # safetensors takes every storage once
            unique[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
            storages.add(storage)
            copied += unique[name].nbytes if shared else 0
            check_memory(
                copied, "copies of one tensor under all its names", "keep them as one: fxcollab.load(directory)"
            )
    kind = "training model" if aliases else "head"
    metadata = {"format": "pt", KIND: kind, ORDER: json.dumps(list(state)), SEAL: NO_SEAL}
    if other_names:
        metadata[_ALIASES] = json.dumps(other_names)
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    try:
        save_file(unique, file, metadata)
        seal(file)
    except (ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(
            "The state can't be written as safetensors.",
            why=str(error),
            hint="is the disk full? Or a tensor of a kind that safetensors has no name for?",
        ) from error
    file.chmod(mode)  # the umask's, which the writer does not follow


def load_state_dict(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file under all their names, in the order they were saved in.

    Raises:
        ArtifactError: the file is missing, damaged, or of another kind.
    """
    path = Path(file)
    with _readable(path):
        if not path.is_file():
            raise ArtifactError(
                "There is no weights file.",
                where=str(path),
                hint="give the state by itself: weights=... (--weights), or save the training model again",
            )
        with safe_open(path, framework="pt") as opened:
            names = _stored_names(opened.metadata() or {}, opened.keys())
            tensors = {name: opened.get_tensor(name) for name in set(names.values())}
        return {name: tensors[stored] for name, stored in names.items()}


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Whatever is wrong with a file of weights is a `DamagedError`."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise DamagedError(
            "The weights file can't be read.",
            where=str(file),
            why=f"{type(error).__name__}: {error}",
            hint="weights are safetensors files; a checkpoint of torch.save: fxcollab.prune_state_dict("
            "torch.load(file, weights_only=True))",
        ) from error


def _stored_names(metadata: Mapping[str, str], stored: Any) -> dict[str, str]:
    """All names in the order they were saved in, with those under which their tensors are stored.

    Raises:
        ValueError: the metadata are those of other tensors.
    """
    aliases, order = (json.loads(metadata.get(key, empty)) for key, empty in ((_ALIASES, "{}"), (ORDER, "null")))
    if not isinstance(aliases, dict) or not isinstance(order, list | None):
        raise ValueError("its metadata are damaged")
    names = dict.fromkeys(stored)
    all_names = {**{name: name for name in names}, **aliases}
    if aliases.keys() & names.keys() or not set(map(str, aliases.values())) <= names.keys():
        raise ValueError(f"its metadata give tensors other names than theirs: {_few(aliases)}")
    if order is None:
        return all_names
    if len(order) != len(all_names) or set(map(str, order)) != all_names.keys():
        raise ValueError("its metadata name other tensors than it holds")
    return {name: all_names[name] for name in order}


def checksum(file: Path) -> str:
    """The checksum of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def refuse_changed(file: Path, expected: str | None) -> None:
    """Raise where a file is not the one that the plan was written with; None for plans that don't say it.

    Raises:
        DamagedError: it isn't.
    """
    if expected is not None and checksum(file) != expected:
        raise DamagedError(
            "The weights are not those that the plan was written with.",
            where=str(file),
            why="their checksum is another",
            hint="a checkpoint of the same training model is given by itself: weights=... (--weights), beside the "
            f"folder's own {WEIGHTS}",
        )


def refuse_other_model(file: Path, own: Path, peers: str) -> None:
    """Raise where a checkpoint has other names, shapes or types than an artifact's own weights.

    All tensors of a type may have another one, such as bfloat16 instead of float32.

    Raises:
        MixedError: it is of another training model, or lacks a part.
    """
    given, expected = unwrapped(_described(file), peers), _described(own)
    wrong = [name for name in {**expected, **given} if _of(given, name, 1) != _of(expected, name, 1)]
    why = "these are missing in one of the two, or have another shape"
    if not wrong:
        given_one, own_one = _stored_once(unwrapped(names_in(file), peers)), _stored_once(names_in(own))
        wrong = [name for name in given_one if given_one[name] - own_one[name]]
        why = "these are one tensor with others, and have values of their own in the training model"
    if not wrong:
        types: dict[str, str] = {}
        kept = {name: (types.setdefault(_of(expected, name, 0), _of(given, name, 0))) for name in expected}
        wrong = [name for name, new in kept.items() if new != _of(given, name, 0)]
        wrong += [name for name in expected if not _is_same_kind(_of(expected, name, 0), _of(given, name, 0))]
        why = "these have types that tensors like them don't have"
    if wrong:
        raise MixedError(
            "The weights are not those of this training model.",
            where=f"{file}: {_few(wrong)}",
            why=f"{why}; {own} has what is expected",
            hint="give the whole state of the same training model",
        )


def refuse_other_tensors(file: Path, state: Mapping[str, Tensor], peers: str) -> None:
    """Raise where weights are not those of a model on meta, before one takes memory for them.

    Raises:
        MixedError: a tensor is missing, has another shape, or is one with others that are not one in the model.
    """
    given, stored = unwrapped(_described(file), peers), unwrapped(names_in(file), peers)
    wrong = [name for name, own in state.items() if name not in given or given[name][1] != [*own.shape]]
    if not wrong:
        first = {stored[name]: tensor for name, tensor in state.items()}
        wrong = [name for name, tensor in state.items() if first[stored[name]] is not tensor]
    if wrong:
        raise MixedError(
            "The weights are not those of the model that the plan names.",
            where=f"{file}: {_few(wrong)}",
            why="these are missing, have another shape, or are stored as one with others",
            hint="give the whole state of the same training model",
        )


def refuse_other_tree(names: Iterable[str], tree: HeadTree, peers: str, file: Path) -> None:
    """Raise where weights are those of other branches than the plan's.

    Raises:
        ArtifactError: with the branches of both.
    """
    planned = {branch_name(path) for path in tree.peers()}
    found = {name.split(".")[1] for name in names if name.startswith(f"{peers}.")}
    if found != planned:
        raise ArtifactError(
            "The weights are those of another head tree.",
            where=str(file),
            why=f"they have the branches {_few(sorted(found)) or 'none'}, the plan {_few(sorted(planned))}",
            hint="give weights of this training model",
        )


def _described(file: Path) -> dict[str, tuple[str, Any]]:
    """The type and the shape of every tensor, by all its names; nothing where there is no such file."""
    names, header = names_in(file), weights_header(file)
    with _readable(file):
        return {name: (str(header[stored]["dtype"]), [*header[stored]["shape"]]) for name, stored in names.items()}


def names_in(file: Path) -> dict[str, str]:
    """All names with those under which their tensors are stored; nothing where there is no such file.

    Raises:
        DamagedError: the header doesn't fit itself, or the file's size.
    """
    if not file.is_file():
        return {}
    with _readable(file), safe_open(file, framework="pt") as opened:
        return _stored_names(opened.metadata() or {}, opened.keys())


def _stored_once(names: Mapping[str, str]) -> dict[str, set[str]]:
    """For every name all names that have the same tensor."""
    of: dict[str, set[str]] = {}
    for name, stored in names.items():
        of.setdefault(stored, set()).add(name)
    return {name: of[stored] for name, stored in names.items()}


def _of(described: Mapping[str, tuple[str, Any]], name: str, which: int) -> Any:
    return described[name][which] if name in described else None


def _is_same_kind(one: str, other: str) -> bool:
    return one == other or (one.startswith(("F", "BF")) and other.startswith(("F", "BF")))


def _few(names: Any) -> str:
    return f"{', '.join(list(names)[:4])}{' and more' if len(names) > 4 else ''}"


def refuse_unwritable(file: Path, force: bool) -> None:
    """Raise an `OutputError` where one head's weights can't be written to a file.

    Weights of an artifact are never replaced by those of one head.
    """
    if file.name == WEIGHTS and (file.parent / PLAN).is_file():
        raise OutputError(
            "The output is an artifact's own weights.",
            where=str(file),
            why="they hold all heads, which would be lost",
            hint="give another path: -o head.safetensors",
        )
    refuse_existing_file(file, force, is_head)


def write_state_dict(state: Mapping[str, Any], file: Path, *, force: bool = False) -> None:
    """Write a state dict to a file that appears whole or not at all and that any safetensors reader reads.

    Raises:
        OutputError: the file exists and ``force`` is not given, or it is of another kind.
        ArtifactError: a value is not a tensor with values.
    """
    refuse_unwritable(file, force)
    with written(file, force, only(is_head)) as draft:
        save_state_dict(state, draft)


def _checked(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ArtifactError(
            f"State {name!r} is a {type(value).__qualname__}, not a tensor.",
            why="safetensors files hold tensors only, and fxcollab writes no pickle",
            hint=_BY_TORCH,
        )
    if name == _HEADER:
        raise ArtifactError(
            f"State can't be called {name!r}.", why="safetensors files have their own data there", hint=_BY_TORCH
        )
    if value.layout is not torch.strided:
        raise ArtifactError(
            f"State {name!r} is a {value.layout} tensor.",
            why="safetensors files hold dense tensors only",
            hint=_BY_TORCH,
        )
    if value.is_meta:
        raise ArtifactError(
            f"State {name!r} has no values.",
            why="it is on the meta device",
            hint="give the training model values first, as with train_model.to_empty(device='cpu') and a checkpoint",
        )
    return value
