"""Training where people train: each file is one short script, ``python -m samples.integrations.NAME``."""
