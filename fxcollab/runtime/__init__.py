"""What the generated forward of a training model calls."""

from fxcollab.runtime.copying import private_copy
from fxcollab.runtime.fed import Fed
from fxcollab.runtime.recompute import recompute
from fxcollab.runtime.rescale import rescale

__all__ = ["Fed", "private_copy", "recompute", "rescale"]
