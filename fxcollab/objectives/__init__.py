"""Learning objectives over the outputs of a training model's heads."""

from fxcollab.objectives.collaborative import CollaborativeLoss
from fxcollab.objectives.distillation import DistillationLoss
from fxcollab.objectives.gated import Gate, ONELoss
from fxcollab.objectives.kdcl import KDCLLoss
from fxcollab.objectives.mutual import MutualLoss
from fxcollab.objectives.objective import Objective

__all__ = ["CollaborativeLoss", "DistillationLoss", "Gate", "KDCLLoss", "MutualLoss", "ONELoss", "Objective"]
