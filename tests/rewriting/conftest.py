"""Settings of these tests."""

import pytest


@pytest.fixture(autouse=True)
def _seeded(seeded: None) -> None:
    """Small random networks, the same at every run."""
