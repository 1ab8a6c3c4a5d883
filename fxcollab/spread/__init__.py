"""Spread: the heads of a training model over the ranks of ``torch.distributed``."""

from fxcollab.spread.spread import gathered_state_dict, gradient_norm, spread

__all__ = ["gathered_state_dict", "gradient_norm", "spread"]
