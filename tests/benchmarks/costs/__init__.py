"""Costs of planned training graphs against those of built ones."""
