"""What models and planned training graphs cost, counted on fake tensors."""

from fxcollab.costs.forward import forward_flops, parameter_count

__all__ = ["forward_flops", "parameter_count"]
