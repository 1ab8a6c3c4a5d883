"""A regression: scikit-learn's diabetes data, where a share of the training targets belongs to other patients.

python -m samples.regression --seeds 20    # three ways at two levels of noise each, seconds a run
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import fxcollab
from samples.networks.small import TableNet
from samples.paper.paired import gain
from samples.training.lines import append, read

COUNT, EPOCHS, BATCH = 300, 60, 50
WAYS = {"one network": None, "4 instances": "multi-instance", "4 heads at stage1": "simple"}
NOISE = (0.0, 0.4)


@dataclass(frozen=True)
class Diabetes:
    """Rows of ten measurements (N, 10) and what is told from them (N, 1), of mean 0 and deviation 1 in training."""

    rows: Tensor
    targets: Tensor
    test_rows: Tensor
    test_targets: Tensor


def diabetes(noise: float, seed: int) -> Diabetes:
    """The same 300 patients for training always; the seed draws whose targets are exchanged."""
    found = load_diabetes()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    rows, targets = (torch.from_numpy(part).float()[order] for part in (found.data, found.target))
    rows, targets = ((part - part[:COUNT].mean(0)) / part[:COUNT].std(0) for part in (rows, targets[:, None]))
    generator = torch.Generator().manual_seed(seed)
    exchanged = torch.randperm(COUNT, generator=generator)[: round(noise * COUNT)]
    training = targets[:COUNT].clone()
    training[exchanged] = training[exchanged.roll(1)]
    return Diabetes(rows[:COUNT], training, rows[COUNT:], targets[COUNT:])


def train(way: str, noise: float, seed: int) -> float:
    """The root mean squared error of head 0 as a plain network, in deviations of the target."""
    pattern, data = WAYS[way], diabetes(noise, seed)
    torch.manual_seed(seed)
    model: nn.Module = TableNet(1, 10)
    if pattern:
        splits = ["stage1"] if pattern == "simple" else []
        torch.manual_seed(seed)  # head 0 starts as the one network does
        model = fxcollab.transform(lambda: TableNet(1, 10), pattern, splits, heads=4, seed=seed)
    loss = fxcollab.CollaborativeLoss(0.5 if pattern else 1.0, hard=nn.MSELoss())
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9, weight_decay=1e-4)
    for epoch in range(EPOCHS):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        for index in order.split(BATCH):
            optimizer.zero_grad()
            outputs = model(data.rows[index])
            loss(outputs if pattern else (outputs,), data.targets[index]).backward()
            optimizer.step()
    inference = (fxcollab.prune(model, head=0) if pattern else model).eval()
    with torch.no_grad():
        return float((inference(data.test_rows) - data.test_targets).square().mean().sqrt())


def compare(rows: list[dict[str, float | str]]) -> Iterator[str]:
    """Mean errors, and paired gains in hundredths of a deviation, with their 95 % intervals."""
    for noise in NOISE:
        for way in WAYS:
            runs = [row for row in rows if row["way"] == way and row["noise"] == noise]
            base = [row for row in rows if row["way"] == "one network" and row["noise"] == noise]
            found = gain(runs, base)
            mean = sum(float(row["error"]) for row in runs) / len(runs)
            yield f"{noise:4.0%}  {way:20} {mean:.3f}" + (f"   {found}, t {found.t:.1f}" if found else "")


def main(seeds: int, file: Path) -> list[dict[str, float | str]]:
    """Every way with every seed; rows that the file has already aren't run again."""
    rows = read(file)
    done = {(row["way"], row["noise"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for noise in NOISE:
            for way in WAYS:
                if (way, noise, seed) not in done:
                    rows.append({"way": way, "noise": noise, "seed": seed, "error": train(way, noise, seed)})
                    append(file, rows[-1])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("-o", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="a file of rows")
    options = parser.parse_args()
    print("\n".join(compare(main(options.seeds, options.o))))
