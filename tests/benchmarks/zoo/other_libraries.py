"""Small models of further libraries, as tables of the expressions that make them.

They are no dependencies of the tests: what is not installed is skipped with a message. To have them all, without
their own wishes for versions of torch::

    pip install --no-deps segmentation_models_pytorch monai torch_geometric open_clip_torch vit-pytorch peft loralib \
        diffusers torchaudio speechbrain nnAudio x-transformers byol-pytorch
    pip install einops einx ftfy hyperpyyaml loguru requests xxhash beartype frozendict hyper-connections \
        torch-einops-utils assoc-scan
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import torch
from torch import nn

from tests.benchmarks.zoo.families import Family
from tests.benchmarks.zoo.models import Entry
from tests.benchmarks.zoo.other_images import IMAGES
from tests.benchmarks.zoo.other_sequences import SEQUENCES

FAMILIES = [*IMAGES, *SEQUENCES]


@functools.cache
def other_entries() -> Mapping[str, Entry]:
    """All models of the libraries that are installed, by name."""
    return {entry.name: entry for entry in _entries()}


def _entries() -> Iterator[Entry]:
    for library in dict.fromkeys(family.module.partition(".")[0] for family in FAMILIES):
        if find_spec(library) is None:
            print(f"{library} is not installed: its models are skipped", file=sys.stderr)
            continue
        for family in FAMILIES:
            if family.module.partition(".")[0] == library:
                for model in family.models:
                    build = functools.partial(_built, family, model)
                    larger = functools.partial(family.inputs, batch=3)
                    yield Entry(
                        f"{library}:{family.module.partition('.')[2]}:{model}",
                        build, family.inputs, family.module, real=True, larger=larger, stages=family.stages,
                    )  # fmt: skip


def _built(family: Family, expression: str) -> nn.Module:
    module = importlib.import_module(family.module)
    names = {word: getattr(module, word) for word in re.findall(r"\w+", expression) if hasattr(module, word)}
    model: nn.Module = eval(expression, {"torch": torch, "nn": nn, "small": family.small, **names})
    return model
