"""``plan.json``: the plan as plain data, checked entry by entry."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import torch

from fxcollab.codegen.branches import Recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import ArtifactError, DamagedError, FxCollabError
from fxcollab.fingerprint import fingerprint
from fxcollab.io.recognise import CHECKSUM, MOST_PLAN_BYTES, PLAN, checksum_of
from fxcollab.limits import MOST_ELEMENTS, check_count
from fxcollab.patterns import is_made_by
from fxcollab.plan import Plan, RewriteOptions, check_peers, plan_of
from fxcollab.rewriting.outputs import EvalOutput
from fxcollab.sources.source import Source
from fxcollab.tracing.capture import Granularity
from fxcollab.tracing.interface import InputSpec, Interface
from fxcollab.tree import HeadTree, hierarchical, multi_instance
from fxcollab.version import __version__

FORMAT = 1
WEIGHTS_KEY = "weights"
"""The entry with the checksum of the weights."""
_MOST_ENTRIES = 1 << 10


def read_plan(directory: str | os.PathLike[str]) -> Plan:
    """The plan in an artifact's folder.

    Raises:
        ArtifactError: there is none, or it is damaged or of another format.
    """
    return read_plan_file(Path(directory))[0]


def read_plan_file(folder: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan in a folder, and the JSON data that it was read from; errors as of `read_plan`."""
    file = folder / PLAN
    try:
        if not file.is_file():
            kind = f"it has no {PLAN}" if folder.is_dir() else "it is a file"
            raise ArtifactError(
                "There is no artifact here.",
                where=str(folder),
                why=kind if folder.exists() else "there is no such directory",
                hint="give the directory that fxcollab transform wrote; for a checkpoint of torch.save, in Python: "
                "fxcollab.prune_state_dict(torch.load(file, weights_only=True))",
            )
    except OSError as error:  # too long, no access, links in a circle
        hint = "give another path, or the right to read this one"
        raise ArtifactError("The directory can't be read.", where=str(folder), why=str(error), hint=hint) from error
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_PLAN_BYTES + 1)
        if len(text) > MOST_PLAN_BYTES:
            raise ValueError(f"it is larger than {MOST_PLAN_BYTES >> 20} MB")
        data = json.loads(text.decode("utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it is not a JSON object")
        if data.get("format") == FORMAT and _is_a(data["format"], int):
            plan = _plan_from_json(data, folder)
            if data.get(CHECKSUM, ...) not in (..., checksum_of(data)):
                raise ValueError(f"its {CHECKSUM!r} is that of other entries; without a checksum it can be edited")
            return plan, data
    except (ValueError, OSError, RecursionError, FxCollabError) as error:
        why = str(error)
        if isinstance(error, FxCollabError):
            why = ": ".join(part for part in (error.what.rstrip("."), error.why) if part)
        raise DamagedError("The plan is damaged.", where=str(file), why=why, hint="transform anew") from error
    raise ArtifactError(
        "The plan has another format.",
        where=str(file),
        why=f"it says {data.get('format')!r}, this version reads {FORMAT}",
        hint="load it with the version of fxcollab that wrote it",
    )


def plan_to_json(model: CollabGraphModule, target: Path, weights: str) -> dict[str, Any]:
    """The plan of a training model as JSON data.

    Args:
        model: the training model.
        target: the folder that the source's path is relative to.
        weights: the checksum of the weights.
    """
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
        "inputs": [
            {"name": spec.name, "shape": spec.shape, "dtype": spec.dtype, "structured": spec.structured}
            for spec in plan.interface.inputs
        ],
        "fixed": dict(plan.interface.fixed),
        "fingerprint": fingerprint(model.modes),
        WEIGHTS_KEY: weights,
    }


def _plan_from_json(data: Mapping[str, Any], folder: Path) -> Plan:
    """The plan; what is wrong with the first entry that doesn't fit is a `ValueError` or an `FxCollabError`."""
    pattern = _entry(data, "pattern", str)
    _entry(data, "fingerprint", str)
    _entry({WEIGHTS_KEY: None, **data}, WEIGHTS_KEY, str | None)
    splits, fanouts = _entry(data, "splits", list, of=str), _entry(data, "fanouts", list, of=int | list)
    inputs = tuple(map(_input_from_json, _entry(data, "inputs", list, of=dict)))
    if len({spec.name for spec in inputs}) < len(inputs):
        raise ValueError("two of its 'inputs' have one name")
    check_count(sum(math.prod(spec.shape or ()) for spec in inputs), MOST_ELEMENTS, "values of all inputs", "")
    source = _entry(data, "source", dict | None)
    return Plan(
        pattern,
        _tree_from_json(pattern, splits, fanouts),
        _options_from_json(data),
        _entry(data, "granularity", str, among=get_args(Granularity)),
        Interface(inputs, tuple(_entry(data, "fixed", dict).items())),
        None if source is None else Source.from_json(source, folder),
        _entry({"chosen": None, **data}, "chosen", str | None),
    )


def _options_from_json(data: Mapping[str, Any]) -> RewriteOptions:
    """Options that a file of an earlier version lacks have their defaults."""
    default = RewriteOptions()
    if data.get("recompute") is not None:
        _entry(data, "recompute", str, among=get_args(Recompute))
    if "eval_output" in data:
        _entry(data, "eval_output", str, among=get_args(EvalOutput))
    names = [field.name for field in fields(RewriteOptions) if field.name in data]
    kinds: dict[str, type | UnionType] = {name: type(getattr(default, name)) for name in names}
    kinds["recompute"] = str | None
    options = RewriteOptions(**{name: _entry(data, name, kinds[name]) for name in names})
    check_peers(options.peers)
    return options


def _tree_from_json(pattern: str, splits: tuple[str, ...], fanouts: tuple[int | list[int], ...]) -> HeadTree:
    """The tree itself; the pattern that made it is only a name, behind which a file could name any code."""
    counts = [tuple(each) if isinstance(each, list) else each for each in fanouts]
    if splits:
        tree = hierarchical(splits, counts)
    elif len(counts) == 1 and isinstance(counts[0], int):
        tree = multi_instance(counts[0])
    else:
        raise ValueError(f"its 'fanouts' are {list(fanouts)}, but without splits there is one")
    if not is_made_by(pattern, tree):
        raise ValueError(f"its 'fanouts' are {list(fanouts)}, which are not those of pattern {pattern!r}")
    return tree


def _input_from_json(data: Mapping[str, Any]) -> InputSpec:
    spec = InputSpec(
        _entry(data, "name", str),
        _entry(data, "shape", list | None, of=int),
        _entry(data, "dtype", str | None),
        _entry({"structured": False, **data}, "structured", bool),
    )
    if (spec.shape is None) != (spec.dtype is None) or not isinstance(
        getattr(torch, "float32" if spec.dtype is None else spec.dtype, None), torch.dtype
    ):
        raise ValueError(f"its input {spec.name!r} has the type {spec.dtype!r}")
    return spec.checked()


def _entry(
    data: Mapping[str, Any],
    key: str,
    kind: type | UnionType,
    *,
    of: type | UnionType | None = None,
    among: Sequence[Any] = (),
) -> Any:
    """An entry of a kind, as a tuple where its items must be ``of`` a kind.

    Raises:
        ValueError: it is missing, of another kind or not among the allowed values.
    """
    if key not in data:
        raise ValueError(f"it has no {key!r}")
    value = data[key]
    if not _is_a(value, kind) or (among and value not in among):
        raise ValueError(f"its {key!r} is {_in_short(value)}")
    if of is None or value is None:
        return value
    if len(value) > _MOST_ENTRIES or not all(_is_a(item, of) for item in value):
        raise ValueError(f"its {key!r} are {_in_short(value)}")
    return tuple(value)


def _is_a(value: object, kind: type | UnionType) -> bool:
    """Whether a value is of a kind; a boolean is no number."""
    return isinstance(value, kind) and (not isinstance(value, bool) or kind is bool)


def _in_short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."
