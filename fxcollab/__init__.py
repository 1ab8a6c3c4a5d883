"""Collaborative learning for deep neural networks, as a graph-rewriting pass over ``torch.fx``.

import fxcollab

train_model = fxcollab.transform(model, splits=["layer2", "layer3"])
loss = fxcollab.CollaborativeLoss()(train_model(x), target)
inference = fxcollab.prune(train_model, head=0)
"""

from fxcollab.artifact import load, save
from fxcollab.capture import capture
from fxcollab.choice import Candidate, Choice, Option, choose_splits, evenness, find_splits
from fxcollab.codegen import CollabGraphModule
from fxcollab.costs import Costs, StepCost, training_costs
from fxcollab.diff import Diff, diff
from fxcollab.errors import (
    ArtifactError,
    CaptureError,
    DiffError,
    FxCollabError,
    ObjectiveError,
    PatternError,
    SourceError,
    SplitError,
    StateError,
    VerificationError,
)
from fxcollab.objectives import (
    CollaborativeLoss,
    DistillationLoss,
    KDCLLoss,
    MutualLoss,
    Objective,
    ONELoss,
)
from fxcollab.partition import partition
from fxcollab.prune import prune
from fxcollab.rewrite import rewrite
from fxcollab.runtime import private_copy, rescale
from fxcollab.spread import gathered_state_dict, gradient_norm, spread
from fxcollab.state_dict import prune_state_dict
from fxcollab.summary import Summary, summarise
from fxcollab.transform import transform
from fxcollab.tree import HeadTree
from fxcollab.verify import Report, verify
from fxcollab.version import __version__

__all__ = [
    "ArtifactError",
    "Candidate",
    "CaptureError",
    "Choice",
    "CollabGraphModule",
    "CollaborativeLoss",
    "Costs",
    "Diff",
    "DiffError",
    "DistillationLoss",
    "FxCollabError",
    "HeadTree",
    "KDCLLoss",
    "MutualLoss",
    "ONELoss",
    "Objective",
    "ObjectiveError",
    "Option",
    "PatternError",
    "Report",
    "SourceError",
    "SplitError",
    "StateError",
    "StepCost",
    "Summary",
    "VerificationError",
    "__version__",
    "capture",
    "choose_splits",
    "diff",
    "evenness",
    "find_splits",
    "gathered_state_dict",
    "gradient_norm",
    "load",
    "partition",
    "private_copy",
    "prune",
    "prune_state_dict",
    "rescale",
    "rewrite",
    "save",
    "spread",
    "summarise",
    "training_costs",
    "transform",
    "verify",
]
