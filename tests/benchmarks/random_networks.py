"""Random networks in large numbers: ``python -m tests.benchmarks.random_networks --count 10000 --seed 0``.

Prints how many were proved and why others were refused; a difference ends the run with the network that shows it,
shrunk. Batches of 250 with seeds of their own go to ``--processes`` processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.progress import track

from tests.random_networks import Network, networks
from tests.random_proofs import proof_of

BATCH = 250
RESULTS = Path(__file__).parent / "results" / "random_networks.json"


def run(batch_seed: int, count: int = BATCH) -> Counter[str]:
    """What became of ``count`` networks.

    Raises:
        AssertionError: one shows a difference; the smallest found.
    """
    torch.set_num_threads(1)
    results: Counter[str] = Counter()

    @seed(batch_seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(), st.data())
    def prove(network: Network, data: st.DataObject) -> None:
        results[proof_of(network, data)] += 1

    prove()
    return results


def main() -> None:
    """Run the batches and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.count // BATCH)
    start, total = time.perf_counter(), Counter[str]()
    with ProcessPoolExecutor(arguments.processes) as pool:
        for results in track(pool.map(run, seeds), total=len(seeds)):
            total += results
    record = {
        "seeds": [seeds.start, seeds.stop],
        "networks": total.total(),
        "proved": total["proved"],
        "refused": {reason: number for reason, number in sorted(total.items()) if reason != "proved"},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
