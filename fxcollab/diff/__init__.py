"""The visual diff of training and inference graphs."""

from fxcollab.diff.build import diff
from fxcollab.diff.model import Diff, DiffNode

__all__ = ["Diff", "DiffNode", "diff"]
