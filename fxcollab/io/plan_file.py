"""``plan.json``: the plan as plain data, checked entry by entry."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import torch

from fxcollab.codegen.branches import Recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import ArtifactError, FxCollabError
from fxcollab.fx_utils import describe_node
from fxcollab.io.folder import PLAN
from fxcollab.plan import Plan, RewriteOptions, plan_of
from fxcollab.runtime.operators import guard
from fxcollab.sources.source import Source
from fxcollab.tracing.capture import Granularity
from fxcollab.tracing.interface import InputSpec, Interface
from fxcollab.tree import HeadTree, head_tree
from fxcollab.version import __version__

FORMAT = 1


def read_plan(directory: str | os.PathLike[str]) -> Plan:
    """The plan in an artifact's folder.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    return plan_from_json(read_plan_data(Path(directory)), Path(directory))


def fingerprint(train_model: CollabGraphModule) -> str:
    """A hash of the training graphs: every node's name, op, target and arguments, in order."""
    digest = hashlib.sha256()
    for graph in train_model.modes:
        for node in graph.nodes:
            name, op, target, args, kwargs, _ = describe_node(node)
            args = args[:-1] if target is guard else args  # the line that asks may move
            called = target if isinstance(target, str) else torch.typename(target)
            called = getattr(target, "__name__", called) if callable(target) else called
            digest.update(f"{op} {name} {called} {args} {kwargs}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()


def plan_to_json(model: CollabGraphModule, target: Path) -> dict[str, Any]:
    """The plan of a training model as JSON data; the source's path is relative to the folder ``target``."""
    plan = plan_of(model)
    return {
        "format": FORMAT,
        "fxcollab": __version__,
        "torch": torch.__version__,
        "source": plan.source.to_json(target) if plan.source else None,
        "pattern": plan.pattern,
        "splits": list(plan.tree.splits),
        "fanouts": list(plan.tree.fanouts),
        "chosen": plan.chosen,
        "granularity": plan.granularity,
        **asdict(plan.options),
        "inputs": [_input_to_json(spec) for spec in plan.interface.inputs],
        "fixed": dict(plan.interface.fixed),
        "fingerprint": fingerprint(model),
    }


def read_plan_data(folder: Path) -> dict[str, Any]:
    """What ``plan.json`` holds, of this version's format.

    Raises:
        ArtifactError: there is none, it can't be read, or it has another format.
    """
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


def plan_from_json(data: Mapping[str, Any], folder: Path) -> Plan:
    """The plan that such data stands for.

    Raises:
        ArtifactError: naming the first entry that is wrong.
    """
    try:
        pattern = _typed(data, "pattern", str)
        _typed(data, "fingerprint", str)
        return Plan(
            pattern,
            _tree_from_json(pattern, _items(data, "splits", str), _items(data, "fanouts", int | list)),
            _options_from_json(data),
            _one_of(data, "granularity", get_args(Granularity)),
            Interface(
                tuple(map(_input_from_json, _items(data, "inputs", dict))), tuple(_typed(data, "fixed", dict).items())
            ),
            None if _typed(data, "source", dict | None) is None else Source.from_json(data["source"], folder),
            _typed(data, "chosen", str | None) if "chosen" in data else None,
        )
    except ValueError as error:
        raise _damaged(folder / PLAN, str(error)) from error
    except FxCollabError as error:
        raise _damaged(folder / PLAN, error.why or error.what) from error


def _options_from_json(data: Mapping[str, Any]) -> RewriteOptions:
    """Options that the file lacks, as one of an earlier version does, have their defaults."""
    default = RewriteOptions()
    kinds = {"recompute": str | None}
    given = {
        field.name: _typed(data, field.name, kinds.get(field.name, type(getattr(default, field.name))))
        for field in fields(RewriteOptions)
        if field.name in data
    }
    options = RewriteOptions(**given)
    if options.recompute is not None:
        _one_of(data, "recompute", get_args(Recompute))
    return options


def _tree_from_json(pattern: str, splits: tuple[str, ...], fanouts: tuple[int | list[int], ...]) -> HeadTree:
    if pattern == "hierarchical":
        return head_tree(pattern, splits, None, [tuple(f) if isinstance(f, list) else f for f in fanouts])
    if len(fanouts) != 1 or not isinstance(fanouts[0], int):
        raise ValueError(f"its 'fanouts' are {list(fanouts)}, but pattern {pattern!r} has one")
    return head_tree(pattern, splits, fanouts[0])


def _input_to_json(spec: InputSpec) -> dict[str, Any]:
    shape = None if spec.shape is None else list(spec.shape)
    return {"name": spec.name, "shape": shape, "dtype": spec.dtype, "structured": spec.structured}


def _input_from_json(data: Mapping[str, Any]) -> InputSpec:
    shape = None if _typed(data, "shape", list | None) is None else _items(data, "shape", int)
    structured = _typed(data, "structured", bool) if "structured" in data else False
    return InputSpec(_typed(data, "name", str), shape, _typed(data, "dtype", str | None), structured)


def _items(data: Mapping[str, Any], key: str, kind: type | UnionType) -> tuple[Any, ...]:
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
