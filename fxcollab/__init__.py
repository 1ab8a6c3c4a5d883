"""Collaborative learning for deep neural networks, as a graph-rewriting pass over ``torch.fx``.

train_model = fxcollab.transform(model, splits=["layer2", "layer3"])
loss = fxcollab.CollaborativeLoss()(train_model(x), target)
inference = fxcollab.prune(train_model, head=0)
"""

from fxcollab._transform import transform
from fxcollab.analysis.partition import partition
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.costs import Costs, StepCost, training_costs
from fxcollab.costs.summary import Summary, summarise
from fxcollab.diffs.build import diff
from fxcollab.diffs.compare import Comparison
from fxcollab.diffs.diff import Diff
from fxcollab.distributed.spread import align, gathered_state_dict, gradient_norm, head_state_dicts, spread
from fxcollab.errors import (
    ArgumentTypeError,
    ArtifactError,
    CaptureError,
    DamagedError,
    DiffError,
    ForwardError,
    FxCollabError,
    GuardError,
    LimitError,
    MixedError,
    ObjectiveError,
    OutputError,
    PatternError,
    SourceError,
    SplitError,
    StateError,
    TrustError,
    VerificationError,
)
from fxcollab.groups import parallel_plan, parameter_groups
from fxcollab.heads import Evaluation, all_heads, ensemble, evaluate_heads, original
from fxcollab.io.artifact import load, save
from fxcollab.objectives.collaborative import CollaborativeLoss
from fxcollab.objectives.distillation import DistillationLoss
from fxcollab.objectives.gated import ONELoss
from fxcollab.objectives.kdcl import KDCLLoss
from fxcollab.objectives.mutual import MutualLoss
from fxcollab.objectives.objective import Objective
from fxcollab.patterns import register_pattern
from fxcollab.plan import RewriteOptions
from fxcollab.proof.report import Report
from fxcollab.proof.verify import verify
from fxcollab.rewriting.prune import prune
from fxcollab.rewriting.rewrite import rewrite
from fxcollab.rewriting.state_dict import prune_state_dict
from fxcollab.runtime.private_copy import private_copy
from fxcollab.runtime.rescale import rescale
from fxcollab.splits.candidates import Candidate, find_splits
from fxcollab.splits.choice import Choice
from fxcollab.splits.choose import choose_splits
from fxcollab.splits.option import Option, evenness
from fxcollab.tracing.capture import capture
from fxcollab.tree import HeadTree, original_name
from fxcollab.version import __version__

__all__ = [
    "ArgumentTypeError",
    "ArtifactError",
    "Candidate",
    "CaptureError",
    "Choice",
    "CollabGraphModule",
    "CollaborativeLoss",
    "Comparison",
    "Costs",
    "DamagedError",
    "Diff",
    "DiffError",
    "DistillationLoss",
    "Evaluation",
    "ForwardError",
    "FxCollabError",
    "GuardError",
    "HeadTree",
    "KDCLLoss",
    "LimitError",
    "MixedError",
    "MutualLoss",
    "ONELoss",
    "Objective",
    "ObjectiveError",
    "Option",
    "OutputError",
    "PatternError",
    "Report",
    "RewriteOptions",
    "SourceError",
    "SplitError",
    "StateError",
    "StepCost",
    "Summary",
    "TrustError",
    "VerificationError",
    "__version__",
    "align",
    "all_heads",
    "capture",
    "choose_splits",
    "diff",
    "ensemble",
    "evaluate_heads",
    "evenness",
    "find_splits",
    "gathered_state_dict",
    "gradient_norm",
    "head_state_dicts",
    "load",
    "original",
    "original_name",
    "parallel_plan",
    "parameter_groups",
    "partition",
    "private_copy",
    "prune",
    "prune_state_dict",
    "register_pattern",
    "rescale",
    "rewrite",
    "save",
    "spread",
    "summarise",
    "training_costs",
    "transform",
    "verify",
]
