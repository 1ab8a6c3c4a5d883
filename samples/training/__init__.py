"""A small trainer, shared by ``samples/train.py`` and ``samples/paper``."""
