"""Random networks in large numbers: ``python -m tests.benchmarks.random_networks --count 10000 --seed 0``.

Prints how many were proved and why others were refused, and every difference with the network that shows it, shrunk;
exits with 1 if there was one. Batches of 250 with seeds of their own go to ``--processes`` processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
import warnings
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
_NAME = re.compile(r"(?<!\w)'[^']*'")
RESULTS = Path(__file__).parent / "results" / "random_networks.json"


def run(batch_seed: int, count: int = BATCH) -> tuple[Counter[str], str | None]:
    """What became of ``count`` networks, and the smallest that shows a difference, which ends the batch."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
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

    try:
        prove()
    except AssertionError as difference:
        return results, f"seed {batch_seed}: {difference}"
    return results, None


def main() -> None:
    """Run the batches and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.count // BATCH)
    start, total, differences = time.perf_counter(), Counter[str](), []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for results, difference in track(pool.map(run, seeds), total=len(seeds)):
            for reason, number in results.items():
                total[_NAME.sub("...", reason)] += number
            if difference:
                differences.append(difference)
                print(difference, flush=True)
    record = {
        "seeds": [seeds.start, seeds.stop],
        "networks": total.total(),
        "proved": total["proved"],
        "differences": len(differences),
        "refused": {reason: number for reason, number in sorted(total.items()) if reason != "proved"},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
