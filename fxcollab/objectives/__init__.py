"""Objectives over the outputs of all heads."""
