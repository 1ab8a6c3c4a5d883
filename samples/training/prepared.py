"""Data sets that are no images: a table of measurements, and short texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from samples.training.in_memory import InMemory

FORTUNES = Path("/usr/share/games/fortunes")  # where Debian's package fortunes puts them


class Prepared(InMemory):
    """Inputs that networks take as they are, in place of ``images``: numbers (N, F), or indices of words (N, T)."""

    def _normaliser(self) -> Callable[[Tensor], Tensor]:
        return lambda inputs: inputs


def breast_cancer(count: int = 300) -> Prepared:
    """scikit-learn's breast cancer data: 569 rows of 30 measurements, two classes; those not trained on are tested.

    Args:
        count: how many rows to train on, drawn once and for all; columns are normalised by these.
    """
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    rows, labels = torch.from_numpy(found.data)[order], torch.from_numpy(found.target).long()[order]
    rows = ((rows - rows[:count].mean(0)) / rows[:count].std(0)).float()
    return Prepared(rows[:count], labels[:count], rows[count:], labels[count:], 2)


def fortunes(count: int = 2_000, topics: int = 10, words: int = 4_000, length: int = 40) -> Prepared:
    """The sayings of Debian's package ``fortunes``, and the files that they stand in, which are their topics.

    Args:
        count: how many to train on, drawn once and for all; all others are tested.
        topics: the largest files.
        words: the commonest ones of the training set; 0 is padding, 1 any other word.
        length: how many words of a saying are read.
    """
    files = [file for file in sorted(FORTUNES.iterdir()) if file.is_file() and not file.suffix]
    sayings = {file: file.read_text("utf-8", "replace").split("\n%\n") for file in files}
    largest = sorted(files, key=lambda file: (-len(sayings[file]), file))[:topics]
    texts = [re.findall(r"[a-z']+|[^a-z'\s]", text.lower())[:length] for file in largest for text in sayings[file]]
    labels = torch.tensor([topic for topic, file in enumerate(largest) for _ in sayings[file]])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    seen = Counter(word for index in order[:count].tolist() for word in texts[index])
    known = {word: index for index, (word, _) in enumerate(seen.most_common(words - 2), start=2)}
    inputs = torch.zeros(len(texts), length, dtype=torch.long)
    for row, index in enumerate(order.tolist()):
        found = [known.get(word, 1) for word in texts[index]]
        inputs[row, : len(found)] = torch.tensor(found, dtype=torch.long)
    labels = labels[order]
    return Prepared(inputs[:count], labels[:count], inputs[count:], labels[count:], topics)
