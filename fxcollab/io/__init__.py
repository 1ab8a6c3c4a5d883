"""Saved training models: plan, weights and readable code in a folder."""
