"""Settings of the whole suite."""

import os
import secrets
from collections.abc import Iterator

import pytest
import torch

# Small networks on few cores, often in several processes: more threads only get in each other's way.
torch.set_num_threads(1)


def pytest_configure() -> None:
    """The workers of a run share its seed."""
    os.environ.setdefault("FXCOLLAB_SEED", str(secrets.randbelow(10**9)))


@pytest.fixture(scope="session", autouse=True)
def own_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key by which plans are known as one's own is that of the tests alone."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    os.environ.pop("XDG_STATE_HOME")
    if before is not None:
        os.environ["XDG_STATE_HOME"] = before


def pytest_report_header() -> str:
    """How to repeat the run."""
    return f"random networks: FXCOLLAB_SEED={os.environ['FXCOLLAB_SEED']}"


@pytest.fixture
def seeded() -> None:
    """The test starts from a random state of its own, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def no_compiled_leftovers() -> Iterator[None]:
    """What a test compiles is forgotten after it."""
    yield
    torch.compiler.reset()
