"""What models and planned training graphs cost, counted on fake tensors."""
