"""The plan: from it and the source, the training graph can be made again."""

from __future__ import annotations

import keyword
from dataclasses import dataclass

from torch import nn

from fxcollab.codegen.branches import Recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import StateError
from fxcollab.limits import check_name
from fxcollab.rewriting.init_rules import Init
from fxcollab.rewriting.outputs import EvalOutput
from fxcollab.sources.source import Source
from fxcollab.tracing.capture import Granularity
from fxcollab.tracing.interface import Interface
from fxcollab.tree import HeadTree

PLAN_KEY = "fxcollab"


@dataclass(frozen=True)
class RewriteOptions:
    """The options of the rewrite, which `transform` explains.

    Attributes:
        init: how peers are initialised; in a plan the name of a function that was given.
        seed: of the peers' initialisation.
        rescale: whether crossing values are rescaled.
        peers: the name of the module that has the peers.
        recompute: what is computed again in the backward pass; None for nothing.
        eval_output: what eval mode returns.
    """

    init: Init = "fresh"
    seed: int = 0
    rescale: bool = True
    peers: str = "peers"
    recompute: Recompute | None = None
    eval_output: EvalOutput = "head"


@dataclass(frozen=True)
class Plan:
    """How a training graph was made.

    Attributes:
        pattern: the pattern's name.
        tree: splits and fan-outs.
        options: those of the rewrite.
        granularity: how far the capture opened the model.
        interface: the graph's inputs, with the shapes of the examples, and what is fixed.
        source: where the model came from; None where that is not known.
        chosen: why the splits were chosen; None where they were named.
    """

    pattern: str
    tree: HeadTree
    options: RewriteOptions
    granularity: Granularity
    interface: Interface
    source: Source | None = None
    chosen: str | None = None


def check_peers(name: str) -> None:
    """Raise a `StateError` for what can't be the name of the peers, a `LimitError` for one that is too long."""
    check_name(name, "the peers")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise StateError(f"{name!r} can't be the name of the peers.", hint="give a Python name: peers='heads'")


def plan_of(train_model: nn.Module) -> Plan:
    """The plan of a training model.

    Raises:
        StateError: it is not a training model.
    """
    plan = getattr(train_model, "meta", {}).get(PLAN_KEY) if isinstance(train_model, CollabGraphModule) else None
    if not isinstance(plan, Plan):
        raise StateError(
            f"{type(train_model).__qualname__} is not a training model.",
            why="neither transform nor rewrite made it, or it is the part of one that fxcollab.spread made",
            hint="pass what transform, rewrite or load returned",
        )
    return plan


def training_model(module: nn.Module) -> CollabGraphModule:
    """The training model inside DDP's, ``torch.compile``'s, Lightning's and similar wrappers.

    Raises:
        StateError: there is none, or there are several.
    """
    inner = unwrapped(module)
    plan_of(inner)
    return inner


def unwrapped(module: nn.Module) -> CollabGraphModule:
    """As `training_model`, but the part of a training model that `spread` returns is fine, too."""
    found = [inner for inner in module.modules() if isinstance(inner, CollabGraphModule)]
    planned = [inner for inner in found if PLAN_KEY in inner.meta] or found[:1]
    if len(planned) > 1:
        raise StateError(
            f"{type(module).__qualname__} holds {len(planned)} training models.",
            why="it is not said which of them is meant",
            hint="pass one of them",
        )
    if not planned:
        plan_of(module)  # raises
    return planned[0]
