"""What models and planned training graphs cost, computed on fake tensors."""
