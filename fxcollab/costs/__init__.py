"""What models and planned training graphs cost, counted on fake tensors; times measured on request."""

from fxcollab.costs.costs import Costs, costs_of, parameter_count
from fxcollab.costs.planned import training_costs
from fxcollab.costs.profile import Profile, profile
from fxcollab.costs.step import Placement, StepCost, step_cost

__all__ = [
    "Costs",
    "Placement",
    "Profile",
    "StepCost",
    "costs_of",
    "parameter_count",
    "profile",
    "step_cost",
    "training_costs",
]
