"""Training models where people train; each module needs the extra of its name."""
