"""``python -m tests.benchmarks``: the speed of everything, as `tests.benchmarks.speed` measures it."""

from tests.benchmarks.speed.__main__ import main

if __name__ == "__main__":
    main()
