"""The artifact: a folder from which a training model is loaded.

``plan.json`` holds the plan, ``weights.safetensors`` the state, ``graph.py`` the generated forward for reading and
``diff.html``, if requested, the difference to the original. There is no pickle in it. Loading runs the code that the
plan names: unasked only this account's own, and models of torchvision and timm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab.arguments import checked
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import ArtifactError, CaptureError, MixedError, SplitError, StateError, one_line
from fxcollab.fingerprint import fingerprint
from fxcollab.functional import refuse_mixed, restored_on_error
from fxcollab.io.files import artifact_only, refuse_existing, written
from fxcollab.io.mark import encoded, mark_of, marked_markup
from fxcollab.io.plan_file import WEIGHTS_KEY, plan_to_json, read_plan_file
from fxcollab.io.recognise import GRAPH, PAGE, PLAN, WEIGHTS
from fxcollab.io.trust import refuse_strangers_code, signed
from fxcollab.io.weights import (
    checksum,
    load_state_dict,
    names_in,
    refuse_changed,
    refuse_other_model,
    refuse_other_tree,
    save_state_dict,
)
from fxcollab.passes import CapturePass, run_passes, training_passes
from fxcollab.plan import PLAN_KEY, Plan, plan_of, training_model
from fxcollab.rewriting.rewrite import REWRITTEN_KEY
from fxcollab.rewriting.state_dict import prune_state_dict, unwrapped, without_infixes
from fxcollab.runtime.operators import guard
from fxcollab.sources.load import load as load_source
from fxcollab.sources.loaded import model_of, refuse_while_loading
from fxcollab.sources.source import source_of
from fxcollab.tracing.interface import ExampleInputs

_GRAPH_HEAD = '"""The generated forward; for reading only, fxcollab.load makes it anew."""'


@checked
def save(
    train_model: nn.Module, directory: str | os.PathLike[str], *, force: bool = False, page: str | None = None
) -> Path:
    """Write a training model to a folder.

    The folder appears whole or not at all: an interrupted call leaves the old one or none.

    Args:
        train_model: what `transform` or `load` returned; wrapped by DDP or ``torch.compile`` is fine.
        directory: the folder to make.
        force: replace a folder that holds an artifact and nothing else, as its contents show (default False).
        page: an HTML page to write beside the weights, such as that of `diff` (default: none).

    Raises:
        OutputError: the folder exists, holds something else, or can't be written.
        ArtifactError: the state holds something other than tensors with values, or a pass of yours edited the graph.
    """
    refuse_while_loading("save")
    model, target = training_model(train_model), Path(directory)
    _refuse_edited(model)
    refuse_existing(target, force)
    with written(target, force, artifact_only) as folder:
        folder.mkdir()
        save_state_dict(model.state_dict(keep_vars=True), folder / WEIGHTS, aliases=True)
        (folder / GRAPH).write_bytes(encoded(_readable_code(model)))
        data = signed(plan_to_json(model, target, checksum(folder / WEIGHTS)), plan_of(model).source)
        (folder / PLAN).write_text(f"{json.dumps(data, indent=2)}\n", encoding="utf-8")
        if page is not None:
            (folder / PAGE).write_bytes(encoded(marked_markup(page)))
    return target


@checked
def load(
    directory: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    example_inputs: ExampleInputs | None = None,
    trust_source: bool = False,
) -> CollabGraphModule:
    """Load a saved training model.

    This runs the code that the plan names: unasked only where this account wrote the plan, or where it is the name
    of a model of torchvision or timm; a stranger's needs ``trust_source=True``, or the model itself.

    The source is loaded and captured anew, the plan applied, the graph's fingerprint compared, and the weights
    loaded. What the source does inside of modules that stay whole is not compared: keep it with the run.

    Args:
        directory: a folder that `save` wrote.
        model: the model (or a factory), where the plan has no source or another one is to be used (default None);
            what `save` writes of the result names this factory, or nothing.
        weights: a safetensors file with the state, by default the folder's own; the training model may have been
            wrapped when it was saved. The plan's checksum is not compared.
        example_inputs: like those that were given to `transform`, where the forward depends on more than shapes
            (default None).
        trust_source: run the source's code, whoever wrote the plan (default False).

    Raises:
        TrustError: the plan is a stranger's; it says what would run.
        ArtifactError: something in the folder is missing or damaged, or the source makes another graph now. The
            given model is as it was.
        SourceError: the source can't be loaded, or is a script that calls this function itself.
    """
    refuse_while_loading("load")
    folder = Path(directory)
    plan, data = read_plan_file(folder)
    file, origin = folder / WEIGHTS if weights is None else Path(weights), "the given model"
    if model is None:
        if plan.source is None:
            raise ArtifactError(
                "The plan doesn't say where the model comes from.",
                where=str(folder / PLAN),
                why="it was made from a model object, or loaded with one, not from a file or a function",
                hint="in Python give the model: fxcollab.load(directory, model); for the commands, save what "
                "fxcollab.transform(build_model, ...) makes, build_model being a function in a file of its own",
            )
        refuse_strangers_code(data, plan.source, folder, trust_source, file)
        _refuse_other_branches(file, plan)
        origin, model = f"source {plan.source}", load_source(plan.source).model
    else:
        _refuse_other_branches(file, plan)
        plan = replace(plan, source=None if isinstance(model, nn.Module) else source_of(model))
    where = f"{folder / PLAN}, {origin}"
    # Peers are not initialised: their values come from the file.
    options = replace(plan.options, init="copy-anyway")
    capture = CapturePass(plan.tree.splits, example_inputs, plan.granularity, plan.interface)
    try:
        train_model = run_passes(training_passes(plan.tree, capture, options), model_of(model))
    except (CaptureError, SplitError, StateError) as error:
        raise _changed(where, error.what, examples=isinstance(error, CaptureError)) from error
    train_model.meta[PLAN_KEY] = plan
    if fingerprint(train_model.modes) != data["fingerprint"]:
        versions = f"saved with torch {data.get('torch')}, this is {torch.__version__}"
        guarded = any(node.target is guard for graph in train_model.modes for node in graph.nodes)
        unseen = example_inputs is None and not plan.interface.known
        raise _changed(where, f"the graphs' fingerprints differ ({versions})", examples=guarded or unseen)
    _load_state(train_model, folder / WEIGHTS, None if weights is None else Path(weights), data)
    return train_model


def load_head(
    directory: str | os.PathLike[str], head: int = 0, *, weights: str | os.PathLike[str] | None = None
) -> dict[str, Tensor]:
    """The state dict of one head under the original's names; the model and its source are not needed.

    Args:
        directory: a folder that `save` wrote.
        head: the head to keep.
        weights: a safetensors checkpoint of the training model, by default the folder's own.

    Raises:
        ArtifactError: something in the folder is missing or damaged.
        MixedError: the checkpoint lacks a tensor, or is another model's.
        PatternError: there is no such head.
        StateError: the checkpoint is not of a training model.
    """
    plan, data = read_plan_file(Path(directory))
    plan.tree.head_path(head)
    own = Path(directory) / WEIGHTS
    file = own if weights is None else Path(weights)
    state = unwrapped(load_state_dict(file), plan.options.peers)
    has_peers = any(key.startswith(f"{plan.options.peers}.") for key in state)
    if has_peers:  # else `prune_state_dict` says what it is
        refuse_other_tree(state, plan.tree, plan.options.peers, file)
    if weights is None:
        refuse_changed(own, data.get(WEIGHTS_KEY))
    elif own.is_file() and has_peers:
        refuse_other_model(file, own, plan.options.peers)
    pruned = prune_state_dict(state, head, peers=plan.options.peers)
    return {name: tensor.clone() for name, tensor in pruned.items()}  # of a mapped file, which others may change


def _refuse_other_branches(file: Path, plan: Plan) -> None:
    """Raise for weights of other branches than the plan's, before a tree takes memory."""
    if os.path.isfile(file):  # noqa: PTH113, of which a path that is too long is none
        peers = plan.options.peers
        refuse_other_tree(unwrapped(names_in(file), peers), plan.tree, peers, file)


def _refuse_edited(model: CollabGraphModule) -> None:
    if model.meta[REWRITTEN_KEY] != fingerprint(model.modes):
        raise ArtifactError(
            "The training graph was edited, and `load` could not make it again.",
            why="it makes the graph by transform's own passes, and the edit is none of them",
            hint="keep the weights, torch.save(train_model.state_dict(), FILE), and edit anew before loading them; "
            "or keep one head, fxcollab.prune(train_model)",
        )


def _readable_code(model: CollabGraphModule) -> str:
    """The generated forward without the ends of lines that free memory."""
    newline = "\n"
    lines = (line.partition(";  ")[0] for line in model.code.strip().splitlines())
    text = f"{_GRAPH_HEAD}\n\n{newline.join(lines)}\n\n# "
    return f"{text}{mark_of(text)}\n"


def _changed(where: str, why: str, *, examples: bool = False) -> ArtifactError:
    return ArtifactError(
        "The source no longer makes the graph that was saved.",
        where=where,
        why=why,
        hint="load with the code and the versions it was saved with, or transform anew"
        + ("; if transform was given example_inputs, give them to load as well" if examples else ""),
    )


def _load_state(train_model: CollabGraphModule, saved: Path, weights: Path | None, plan: Mapping[str, Any]) -> None:
    """Write values into the model's own tensors, which get the file's types, or change nothing.

    Args:
        train_model: the model.
        saved: the artifact's own file.
        weights: another one to be loaded; None for the artifact's own.
        plan: its JSON data.
    """
    own, file, peers = train_model.state_dict(keep_vars=True), weights or saved, plan_of(train_model).options.peers
    names = {without_infixes(key): key for key in own}  # parts of the model may be compiled
    state = {names.get(key, key): value for key, value in unwrapped(load_state_dict(file), peers).items()}
    wrong = [key for key in own if key not in state or not _fits(state[key], own[key])]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ArtifactError(
            "The weights don't fit the plan.",
            where=f"{file}: {', '.join(wrong[:4])}{' and more' if len(wrong) > 4 else ''}",
            why="these tensors are missing, unknown, or of another shape or type",
            hint="are they of another training model, or has the source changed since it was saved?",
        )
    if weights is None:
        refuse_changed(file, plan.get(WEIGHTS_KEY))
    elif saved.is_file():
        refuse_other_model(file, saved, peers)
    written, assign = dict(state), any(tensor.is_meta for tensor in own.values() if isinstance(tensor, Tensor))
    new: dict[int, Tensor] = {}  # by the old tensor, so that a parameter under two names stays one
    try:
        with restored_on_error(train_model):
            for key, tensor in own.items():
                if assign:
                    is_parameter = isinstance(tensor, nn.Parameter)
                    device = state[key].device if tensor.is_meta else tensor.device
                    value = state[key].to(device, copy=True)  # of a mapped file, which others may change
                    value = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
                    state[key] = new.setdefault(id(tensor), value)
                elif tensor.dtype != state[key].dtype:
                    tensor.data = state[key].to(tensor.device, copy=True)
            own.update(state)  # which has the versions of the modules' formats
            train_model.load_state_dict(own, assign=assign)
            refuse_mixed(train_model, written)
    except MixedError:
        raise
    except Exception as error:  # a module that loads its state in a way of its own, or a tensor that can't be written
        raise ArtifactError(
            "The weights can't be loaded.",
            where=str(file),
            why=one_line(error),
            hint="the model is as it was: can it load its own state_dict()? Buffers of expand() need contiguous()",
        ) from error


def _fits(new: Tensor, own: Tensor) -> bool:
    """Whether a tensor has another's shape, and its type or another floating-point one."""
    return new.shape == own.shape and (
        new.dtype == own.dtype or (new.is_floating_point() and own.is_floating_point())
    )
