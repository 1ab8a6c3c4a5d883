"""Settings of the whole suite."""

import os
import secrets

import torch

# Small networks on few cores, often in several processes: more threads only get in each other's way.
torch.set_num_threads(1)


def pytest_configure() -> None:
    """The workers of a run share its seed."""
    os.environ.setdefault("FXCOLLAB_SEED", str(secrets.randbelow(10**9)))


def pytest_report_header() -> str:
    """How to repeat the run."""
    return f"random networks: FXCOLLAB_SEED={os.environ['FXCOLLAB_SEED']}"
