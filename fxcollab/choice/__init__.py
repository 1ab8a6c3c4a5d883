"""Where to split: the candidates, what they cost, and which to take."""

from fxcollab.choice.candidates import Candidate, find_splits

__all__ = ["Candidate", "find_splits"]
