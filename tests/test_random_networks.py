"""Random networks under random splits: the whole proof, on new ones at every run.

The seed stands in the header of the run; ``FXCOLLAB_SEED=... pytest tests/test_random_networks.py`` repeats it.
"""

import os

import pytest

from tests.benchmarks.random_networks import run

FEW, EACH = 15, 40
SEED = int(os.environ["FXCOLLAB_SEED"])


def test_a_few_random_networks_are_proved_or_refused_with_a_reason() -> None:
    results, difference = run(SEED, FEW)
    assert difference is None, difference
    assert results["proved"], results


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(2))
def test_random_networks_are_proved_or_refused_with_a_reason(batch: int) -> None:
    results, difference = run(SEED + batch, EACH)
    assert difference is None, difference
    assert results["proved"] > EACH / 10, results  # of 40 networks 11 to 34 are, over forty seeds
