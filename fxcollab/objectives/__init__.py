"""Learning objectives over the outputs of a training model's heads."""

from fxcollab.objectives.collaborative import CollaborativeLoss

__all__ = ["CollaborativeLoss"]
