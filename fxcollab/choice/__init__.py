"""Where to split: the candidates, what they cost, and which to take."""

from fxcollab.choice.candidates import Candidate, find_splits
from fxcollab.choice.choose import choose_splits
from fxcollab.choice.explain import Choice, RunnerUp
from fxcollab.choice.option import Objective, Option, evenness

__all__ = ["Candidate", "Choice", "Objective", "Option", "RunnerUp", "choose_splits", "evenness", "find_splits"]
