"""The artifact: a folder that makes the training model again.

``plan.json`` says how, ``weights.safetensors`` holds the state, ``graph.py`` shows the generated forward. There
is no pickle in it. Loading runs the source the plan names, as running one's own model file does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxcollab.capture.interface import InputSpec
from fxcollab.codegen import CollabGraphModule
from fxcollab.errors import ArtifactError
from fxcollab.graphs import describe_node
from fxcollab.partition.levels import tensors_of
from fxcollab.plan import PLAN_KEY, Plan, plan_of, training_model
from fxcollab.source import Source
from fxcollab.transform import transform
from fxcollab.tree import HeadTree
from fxcollab.version import __version__

FORMAT = 1
PLAN, WEIGHTS, GRAPH = "plan.json", "weights.safetensors", "graph.py"
_ALIASES = "fxcollab.aliases"


def save(train_model: nn.Module, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a training model to a folder.

    The folder appears whole or not at all: an interrupted call leaves the old one or none.

    Args:
        train_model: what `transform` or `load` returned; wrapped by DDP or ``torch.compile`` is fine.
        directory: the folder to make.
        force: replace it where it is an artifact already.

    Raises:
        ArtifactError: the folder exists, or the state holds what is no tensor.
    """
    model, target = training_model(train_model), Path(directory)
    refuse_existing(target, force)
    with _replaced(target) as folder:
        save_state_dict(_named_state(model), folder / WEIGHTS)
        (folder / GRAPH).write_text(_readable_code(model))
        (folder / PLAN).write_text(json.dumps(_plan_to_json(model, target), indent=2) + "\n")
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
        weights: a safetensors file to take the state from, by default the folder's own.

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
        model = plan.source.load().model
    train_model = _transform_again(model, plan)
    if fingerprint(train_model) != data["fingerprint"]:
        raise ArtifactError(
            "The source no longer makes the graph that was saved.",
            where=f"{folder / PLAN}, source {plan.source}",
            why=f"the fingerprints differ (saved with torch {data.get('torch')}, this is {torch.__version__})",
            hint="load with the code and the versions it was saved with, or transform anew",
        )
    _load_state(train_model, Path(weights) if weights else folder / WEIGHTS)
    return train_model


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


def save_state_dict(state: Mapping[str, Any], file: Path) -> None:
    """Write tensors to a safetensors file; of tensors that are one, a single copy and the other names.

    Raises:
        ArtifactError: a value is no tensor.
    """
    first: dict[tuple[Any, ...], str] = {}
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArtifactError(
                f"State {name!r} is a {type(value).__qualname__}, not a tensor.",
                why="safetensors files hold tensors only, and fxcollab writes no pickle",
            )
        key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = value.detach().clone(memory_format=torch.contiguous_format)
    metadata = {"format": "pt", **({_ALIASES: json.dumps(aliases)} if aliases else {})}
    metadata["fxcollab.order"] = json.dumps(list(state))
    save_file(unique, file, metadata)


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
        aliases = json.loads(metadata.get(_ALIASES, "{}"))
        order = json.loads(metadata.get("fxcollab.order", "null")) or list(tensors)
        return {name: tensors[aliases.get(name, name)] for name in order}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            "The weights file can't be read.",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            hint="weights are safetensors files; a checkpoint of torch.save: fxcollab.prune_state_dict("
            "torch.load(file, weights_only=True))",
        ) from error


def write_state_dict(state: Mapping[str, Any], file: Path, *, force: bool = False) -> None:
    """Write a state dict to a file that appears whole or not at all.

    Raises:
        ArtifactError: the file exists and ``force`` is not given, or a value is no tensor.
    """
    if file.exists() and not force:
        raise ArtifactError("The file exists.", where=str(file), hint="give --force to replace it")
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        save_state_dict(state, Path(name))
        Path(name).replace(file)
    finally:
        Path(name).unlink(missing_ok=True)


def refuse_existing(target: Path, force: bool) -> None:
    """Refuse an output directory that exists; with ``force``, one that is no artifact.

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
            why=f"it has no {PLAN}",
            hint="give a directory that does not exist",
        )


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place on leaving without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            target.replace(old)
            folder.replace(target)
            shutil.rmtree(old)
        else:
            folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _named_state(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict(keep_vars=True))


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
        "inputs": [{"name": s.name, "shape": s.shape and list(s.shape), "dtype": s.dtype} for s in plan.inputs],
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
        data = json.loads(file.read_text())
    except (ValueError, OSError) as error:
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
        source = None if data["source"] is None else Source.from_json(data["source"], folder)
        return Plan(
            _typed(data, "pattern", str),  # type: ignore[arg-type]
            HeadTree(tuple(map(str, data["splits"])), tuple(map(int, data["fanouts"]))),
            _typed(data, "init", str),
            _typed(data, "seed", int),
            _typed(data, "rescale", bool),
            _typed(data, "granularity", str),  # type: ignore[arg-type]
            _typed(data, "peers", str),
            tuple(InputSpec(i["name"], i["shape"] and tuple(i["shape"]), i["dtype"]) for i in data["inputs"]),
            source,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / PLAN, f"{type(error).__name__}: {error}") from error


def _typed(data: Mapping[str, Any], key: str, kind: type) -> Any:
    value = data[key]
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {value!r}")
    return value


def _damaged(file: Path, why: str) -> ArtifactError:
    return ArtifactError("The plan is damaged.", where=str(file), why=why, hint="transform anew")


def _transform_again(model: nn.Module | Callable[[], nn.Module], plan: Plan) -> CollabGraphModule:
    """The plan's training model, its peers not initialised: their values come from the file."""
    tree, hierarchical = plan.tree, plan.pattern == "hierarchical"
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
        inputs=[spec.name for spec in plan.inputs],
    )
    train_model.meta[PLAN_KEY] = plan
    return train_model


def _load_state(train_model: CollabGraphModule, file: Path) -> None:
    state, own = load_state_dict(file), train_model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ArtifactError(
            "The weights don't fit the plan.",
            where=f"{file}: {', '.join(wrong[:4])}",
            why="these tensors are missing, unknown or of another shape",
            hint="give the weights of this very training model",
        )
    train_model.load_state_dict(state, assign=any(t.is_meta for t in tensors_of(train_model).values()))
