"""The artifact: a folder that makes the training model again.

``plan.json`` says how, ``weights.safetensors`` holds the state, ``graph.py`` shows the generated forward. There
is no pickle in it. Loading runs the source the plan names, as running one's own model file does.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxcollab.capture.capture import Granularity
from fxcollab.capture.interface import InputSpec, Interface
from fxcollab.codegen import CollabGraphModule
from fxcollab.errors import ArtifactError, CaptureError, FxCollabError, SplitError, StateError
from fxcollab.graphs import describe_node
from fxcollab.plan import PLAN_KEY, Plan, plan_of, training_model
from fxcollab.source import Source
from fxcollab.state_dict import prune_state_dict, unwrapped
from fxcollab.transform import transform
from fxcollab.tree import HeadTree, branch_name, head_tree
from fxcollab.version import __version__

FORMAT = 1
PLAN, WEIGHTS, GRAPH = "plan.json", "weights.safetensors", "graph.py"
FILES = frozenset({PLAN, WEIGHTS, GRAPH, "diff.html"})
"""What an artifact's folder may hold and ``force`` may replace."""
_ALIASES, _ORDER = "fxcollab.aliases", "fxcollab.order"


def save(train_model: nn.Module, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a training model to a folder.

    The folder appears whole or not at all: an interrupted call leaves the old one or none.

    Args:
        train_model: what `transform` or `load` returned; wrapped by DDP or ``torch.compile`` is fine.
        directory: the folder to make.
        force: replace it where it is an artifact already, and nothing else lies in it.

    Raises:
        ArtifactError: the folder exists, or the state holds what is no tensor or has no values.
    """
    model, target = training_model(train_model), Path(directory)
    refuse_existing(target, force)
    with _replaced(target.resolve()) as folder:
        save_state_dict(model.state_dict(keep_vars=True), folder / WEIGHTS, aliases=True)
        (folder / GRAPH).write_text(_readable_code(model), encoding="utf-8")
        plan = json.dumps(_plan_to_json(model, target), indent=2)
        (folder / PLAN).write_text(f"{plan}\n", encoding="utf-8")
    return target


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
) -> CollabGraphModule:
    """Make a saved training model again.

    The source is loaded and captured anew, the plan applied, the graph's fingerprint compared, and the weights
    loaded.

    Args:
        directory: a folder that `save` wrote.
        model: the model (or a factory), where the plan names no source or another one is wanted.
        weights: a safetensors file to take the state from, by default the folder's own; the training model
            may have been wrapped when it was saved.

    Raises:
        ArtifactError: something in the folder is missing or damaged, or the source has changed since.
        SourceError: the source can't be loaded.
    """
    folder = Path(directory)
    data = _read_plan(folder)
    plan = _plan_from_json(data, folder)
    if model is None:
        if plan.source is None:
            raise ArtifactError(
                "The plan doesn't say where the model comes from.",
                where=str(folder / PLAN),
                why="it was made from a model object, not from a file or an importable factory",
                hint="give the model: fxcollab.load(directory, model)",
            )
        origin, model = f"source {plan.source}", plan.source.load().model
    else:
        origin = "the given model"
    train_model = _transform_again(model, plan, f"{folder / PLAN}, {origin}")
    if fingerprint(train_model) != data["fingerprint"]:
        versions = f"saved with torch {data.get('torch')}, this is {torch.__version__}"
        raise _changed(f"{folder / PLAN}, {origin}", f"the graphs' fingerprints differ ({versions})")
    _load_state(train_model, Path(weights) if weights else folder / WEIGHTS)
    return train_model


def load_head(
    directory: str | os.PathLike[str], head: int = 0, *, weights: str | os.PathLike[str] | None = None
) -> dict[str, Tensor]:
    """The state dict of one head under the original's names; needs neither the model nor its source.

    Args:
        directory: a folder that `save` wrote.
        head: the head to keep.
        weights: a safetensors checkpoint of the training model, by default the folder's own.

    Raises:
        ArtifactError: something in the folder is missing or damaged, or the checkpoint is another model's.
        PatternError: there is no such head.
        StateError: the checkpoint is not of a training model.
    """
    plan = read_plan(directory)
    plan.tree.head_path(head)
    file = Path(weights) if weights else Path(directory) / WEIGHTS
    state = unwrapped(load_state_dict(file), plan.peers)
    planned = {branch_name(path) for path in plan.tree.peers()}
    found = {key.split(".")[1] for key in state if key.startswith(f"{plan.peers}.")}
    if found and found != planned:
        raise ArtifactError(
            "The weights are those of another head tree.",
            where=str(file),
            why=f"they have the branches {', '.join(sorted(found))}, the plan {', '.join(sorted(planned))}",
            hint="give the weights of this very training model",
        )
    return prune_state_dict(state, head, peers=plan.peers)


def read_plan(directory: str | os.PathLike[str]) -> Plan:
    """The plan in an artifact's folder.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    return _plan_from_json(_read_plan(Path(directory)), Path(directory))


def fingerprint(train_model: CollabGraphModule) -> str:
    """A hash of the training graphs: every node's name, op, target and arguments, in order."""
    digest = hashlib.sha256()
    for graph in train_model.modes:
        for node in graph.nodes:
            name, op, target, args, kwargs, _ = describe_node(node)
            called = target if isinstance(target, str) else torch.typename(target)
            called = getattr(target, "__name__", called) if callable(target) else called
            digest.update(f"{op} {name} {called} {args} {kwargs}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()


def save_state_dict(state: Mapping[str, Any], file: Path, *, aliases: bool = False) -> None:
    """Write tensors to a safetensors file.

    Args:
        state: tensors by name.
        file: the file to write.
        aliases: keep one copy of tensors that are one and note its other names, which only `load_state_dict`
            reads; else every name gets a copy, for any reader.

    Raises:
        ArtifactError: a value is no tensor, has no values, or is of a kind that safetensors doesn't know.
    """
    first: dict[tuple[Any, ...], str] = {}
    unique: dict[str, Tensor] = {}
    other_names: dict[str, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        tensor = _checked(name, value).detach()
        storage = tensor.untyped_storage()._cdata
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if aliases and tensor.numel() and key in first:
            other_names[name] = first[key]
        else:
            first[key] = name
            unique[name] = _alone(tensor, storage in storages)
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
    """Refuse an output file that exists; with ``force``, what is no file.

    Raises:
        ArtifactError: with the way out.
    """
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
        ArtifactError: the file exists and ``force`` is not given, or a value is no tensor.
    """
    refuse_existing_file(file, force)
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = _beside(file)
    try:
        save_state_dict(state, draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def refuse_existing(target: Path, force: bool) -> None:
    """Refuse an output directory that exists; with ``force``, one that is more or less than an artifact.

    Raises:
        ArtifactError: with the way out.
    """
    if not target.exists():
        return
    if not force:
        raise ArtifactError(
            "The output directory exists.", where=str(target), hint="give another one, or force=True (--force)"
        )
    if not (target / PLAN).is_file():
        raise ArtifactError(
            "The output directory is not an artifact and is not replaced.",
            where=str(target),
            why=f"it has no {PLAN}" if target.is_dir() else "it is a file",
            hint="give a directory that does not exist",
        )
    others = sorted(entry.name for entry in target.iterdir() if entry.name not in FILES)
    if others:
        raise ArtifactError(
            "The output directory holds other files and is not replaced.",
            where=str(target),
            why=f"{', '.join(others[:4])}{' and more' if len(others) > 4 else ''} would be lost",
            hint="move them away, or give another directory",
        )


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place on leaving without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(target)
    folder.mkdir()
    try:
        yield folder
        _swap(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, target: Path) -> None:
    """Put ``folder`` in the place of ``target``, which stays where that fails."""
    if not target.exists():
        folder.replace(target)
        return
    old = _beside(target)
    target.replace(old)
    try:
        folder.replace(target)
    except BaseException:
        old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path) -> Path:
    """A hidden path in the same folder that nothing has."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


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


def _alone(tensor: Tensor, shared: bool) -> Tensor:
    """The tensor laid out for writing; a copy only where it is strided or its storage is written already."""
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def _readable_code(model: CollabGraphModule) -> str:
    """The generated forward without the lines' ends that free memory."""
    newline = "\n"
    lines = (line.partition(";  ")[0] for line in model.code.strip().splitlines())
    return f'"""The generated forward; for reading only, fxcollab.load makes it anew."""\n\n{newline.join(lines)}\n'


def _plan_to_json(model: CollabGraphModule, target: Path) -> dict[str, Any]:
    plan = plan_of(model)
    return {
        "format": FORMAT,
        "fxcollab": __version__,
        "torch": torch.__version__,
        "source": plan.source.to_json(target) if plan.source else None,
        "pattern": plan.pattern,
        "splits": list(plan.tree.splits),
        "fanouts": list(plan.tree.fanouts),
        "init": plan.init,
        "seed": plan.seed,
        "rescale": plan.rescale,
        "granularity": plan.granularity,
        "peers": plan.peers,
        "inputs": [_input_to_json(spec) for spec in plan.interface.inputs],
        "fixed": dict(plan.interface.fixed),
        "fingerprint": fingerprint(model),
    }


def _read_plan(folder: Path) -> dict[str, Any]:
    file = folder / PLAN
    if not file.is_file():
        raise ArtifactError(
            "There is no artifact here.",
            where=str(folder),
            why=f"it has no {PLAN}" if folder.is_dir() else "there is no such directory",
            hint="give the directory that fxcollab transform wrote",
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(data, dict):
        raise _damaged(file, "it holds no object")
    if data.get("format") != FORMAT:
        raise ArtifactError(
            "The plan has another format.",
            where=str(file),
            why=f"it says {data.get('format')!r}, this version reads {FORMAT}",
            hint="load it with the version of fxcollab that wrote it",
        )
    return data


def _plan_from_json(data: Mapping[str, Any], folder: Path) -> Plan:
    try:
        pattern = _typed(data, "pattern", str)
        _typed(data, "fingerprint", str)
        return Plan(
            pattern,
            _tree_from_json(pattern, _items(data, "splits", str), _items(data, "fanouts", int)),
            _typed(data, "init", str),
            _typed(data, "seed", int),
            _typed(data, "rescale", bool),
            _one_of(data, "granularity", get_args(Granularity)),
            _typed(data, "peers", str),
            Interface(
                tuple(map(_input_from_json, _items(data, "inputs", dict))), tuple(_typed(data, "fixed", dict).items())
            ),
            None if _typed(data, "source", dict | None) is None else Source.from_json(data["source"], folder),
        )
    except ValueError as error:
        raise _damaged(folder / PLAN, str(error)) from error
    except FxCollabError as error:
        raise _damaged(folder / PLAN, error.why or error.what) from error


def _tree_from_json(pattern: str, splits: tuple[str, ...], fanouts: tuple[int, ...]) -> HeadTree:
    if pattern == "hierarchical":
        return head_tree(pattern, splits, None, fanouts)
    tree = head_tree(pattern, splits, math.prod(fanouts))
    if tree.fanouts != fanouts:
        raise ValueError(f"its 'fanouts' are {list(fanouts)}, but pattern {pattern!r} has one")
    return tree


def _input_to_json(spec: InputSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": spec.shape and list(spec.shape), "dtype": spec.dtype}


def _input_from_json(data: Mapping[str, Any]) -> InputSpec:
    shape = None if _typed(data, "shape", list | None) is None else _items(data, "shape", int)
    return InputSpec(_typed(data, "name", str), shape, _typed(data, "dtype", str | None))


def _items(data: Mapping[str, Any], key: str, kind: type) -> tuple[Any, ...]:
    values = _typed(data, key, list)
    if not all(isinstance(value, kind) for value in values):
        raise ValueError(f"its {key!r} are {values!r}")
    return tuple(values)


def _one_of(data: Mapping[str, Any], key: str, values: Sequence[Any]) -> Any:
    if _typed(data, key, str) not in values:
        raise ValueError(f"its {key!r} is {data[key]!r}")
    return data[key]


def _typed(data: Mapping[str, Any], key: str, kind: type | UnionType) -> Any:
    if key not in data:
        raise ValueError(f"it has no {key!r}")
    value = data[key]
    if not isinstance(value, kind):
        raise ValueError(f"its {key!r} is {value!r}")
    return value


def _damaged(file: Path, why: str) -> ArtifactError:
    return ArtifactError("The plan is damaged.", where=str(file), why=why, hint="transform anew")


def _transform_again(model: nn.Module | Callable[[], nn.Module], plan: Plan, where: str) -> CollabGraphModule:
    """The plan's training model, its peers not initialised: their values come from the file."""
    tree, hierarchical = plan.tree, plan.pattern == "hierarchical"
    try:
        train_model = transform(
            model,
            plan.pattern,
            tree.splits,
            heads=None if hierarchical else tree.heads,
            fanouts=tree.fanouts if hierarchical else None,
            init="copy-anyway",
            seed=plan.seed,
            rescale=plan.rescale,
            granularity=plan.granularity,
            peers=plan.peers,
            interface=plan.interface,
        )
    except (CaptureError, SplitError, StateError) as error:
        raise _changed(where, error.what) from error
    train_model.meta[PLAN_KEY] = plan
    return train_model


def _changed(where: str, why: str) -> ArtifactError:
    return ArtifactError(
        "The source no longer makes the graph that was saved.",
        where=where,
        why=why,
        hint="load with the code and the versions it was saved with, or transform anew",
    )


def _load_state(train_model: CollabGraphModule, file: Path) -> None:
    """Write the file's values into the model's own tensors, which take over their types."""
    own = train_model.state_dict(keep_vars=True)
    state = unwrapped(load_state_dict(file), plan_of(train_model).peers)
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ArtifactError(
            "The weights don't fit the plan.",
            where=f"{file}: {', '.join(wrong[:4])}{' and more' if len(wrong) > 4 else ''}",
            why="these tensors are missing, unknown or of another shape",
            hint="are they of another training model, or has the source changed since it was saved?",
        )
    born: dict[int, Tensor] = {}
    for key, tensor in own.items():
        if tensor.is_meta:
            state[key] = born.setdefault(id(tensor), _like(tensor, state[key]))
        elif tensor.dtype != state[key].dtype:
            tensor.data = state[key].to(tensor.device)
    train_model.load_state_dict(state, assign=bool(born))


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """``values`` in the place of ``tensor``: what is one parameter under two names stays one."""
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
