"""Few labels: 100 of scikit-learn's digits have one, and heads also learn from each other on the others.

python -m samples.semi_supervised --seeds 10    # three ways each, 30 runs of about 20 seconds on a core
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import fxcollab
from samples.integrations.digits import DigitNet, error
from samples.training.in_memory import InMemory, digits

LABELS, EPOCHS, RAMP = 100, 40, 10
UNLABELLED = -100
WAYS = ("labels alone", "consensus on the labelled", "consensus on all, with a ramp")


def few_labels(seed: int) -> InMemory:
    """The training set with labels for ten images of each class, drawn by the seed."""
    data = digits()
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    known = torch.cat([order[data.labels[order] == digit][: LABELS // 10] for digit in range(10)])
    return replace(data, labels=torch.full_like(data.labels, UNLABELLED).index_copy(0, known, data.labels[known]))


def train(way: str, seed: int, heads: int = 4) -> float:
    """The error of head 0 as a plain network, after the last epoch."""
    torch.manual_seed(seed)
    train_model = fxcollab.transform(DigitNet, "simple", ["stage1"], heads=heads, seed=seed)
    loss = fxcollab.CollaborativeLoss(
        hard_weight=1.0, soft_weight=0.0, consensus_on="all" if way == WAYS[2] else "labelled"
    )
    optimizer = torch.optim.SGD(train_model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    data = few_labels(seed)
    for epoch in range(EPOCHS):
        if way != WAYS[0]:
            loss.soft_weight = 1.0 if way == WAYS[1] else min(1.0, epoch / RAMP)
        for images, labels in data.train(epoch, seed, batch=128):  # about nine of a batch have labels
            optimizer.zero_grad()
            loss(train_model(images), labels).backward()
            optimizer.step()
    return error(fxcollab.prune(train_model, head=0))


def compare(rows: list[dict[str, float]]) -> Iterator[str]:
    """Mean errors, and paired differences from labels alone with their standard deviation over the seeds."""
    for way in WAYS:
        errors, gains = [row[way] for row in rows], [row[WAYS[0]] - row[way] for row in rows]
        line = f"{way:30} {statistics.mean(errors):6.2%}"
        if way != WAYS[0] and len(rows) > 1:
            gain, spread = statistics.mean(gains), statistics.stdev(gains)
            t = gain / (spread / len(rows) ** 0.5) if spread else float("nan")
            line += f"   {100 * gain:+.2f} ± {100 * spread:.2f} points, t {t:.1f}"
        yield line


def main(seeds: int = 10, file: Path | None = None) -> list[dict[str, float]]:
    """Every way with every seed; rows that the file has already aren't run again."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []
    for seed in range(len(rows), seeds):
        rows.append({"seed": seed} | {way: train(way, seed) for way in WAYS})
        if file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("-o", type=Path, help="a file of rows, which is added to")
    options = parser.parse_args()
    print("\n".join(compare(main(options.seeds, options.o))))
