"""The models of the zoo: how each is made, what it is called with, and where its library says its stages are."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def _no_inputs(model: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Entry:
    """A model of a library.

    Attributes:
        name: ``library:name``.
        build: makes it, on the default device.
        inputs: example inputs for it; None where they can be guessed.
        real: the questions its forward asks need data: no meta tensors.
        family: the module that defines it; models of one family are variations of one code.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Mapping[str, Any] | None] = _no_inputs
    family: str = ""
    real: bool = False
    larger: Callable[[nn.Module], Mapping[str, Any] | None] = _no_inputs
    stages: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The first part of the name."""
        return self.name.partition(":")[0]

    def splits(self, model: nn.Module, *, late: bool = False) -> tuple[str, str]:
        """Two splits, at about a third and two thirds of the model's stages; ``late``: before the last two."""
        stages = list(self.stages) or stages_of(model)
        if late and len(stages) > 3:
            return stages[-3], stages[-2]
        first = (len(stages) - 1) // 3
        return stages[first], stages[max(2 * (len(stages) - 1) // 3, first + 1)]


@functools.cache
def entries() -> Mapping[str, Entry]:
    """All models of the libraries that are installed, by name."""
    from tests.benchmarks.zoo.transformers_models import transformers_entries

    return {entry.name: entry for entry in (*_timm(), *_torchvision(), *transformers_entries())}


def stages_of(model: nn.Module) -> list[str]:
    """The stages of a model in order: those it names itself, else its largest row of numbered siblings."""
    named = [info["module"] for info in getattr(model, "feature_info", None) or () if isinstance(info, dict)]
    modules = dict(model.named_modules())
    named = [_called(name, modules[name]) for name in dict.fromkeys(named) if name in modules]
    if len(named) >= 3:
        return named
    rows = list(_rows_of_siblings(modules))
    if rows:
        row = max(rows, key=lambda row: (sum(_parts(modules[path]) for path in row), -row[0].count(".")))
        return [_called(path, modules[path]) for path in row]
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    return [_called(name, modules[name]) for name in children]


def _rows_of_siblings(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Three or more modules that a number tells apart: ``layer1, layer2, layer3``, or the members of a sequence."""
    for path, module in modules.items():
        rows: dict[str, list[str]] = {}
        for name in module._modules:
            match, child = _NUMBERED.fullmatch(name), f"{path}.{name}" if path else name
            if match and child in modules:  # and not there under another name already
                rows.setdefault(match[1], []).append(child)
        yield from (row for row in rows.values() if len(row) >= 3)


_NUMBERED = re.compile(r"(.*?)\d+[a-z]?")


def _parts(module: nn.Module) -> int:
    return sum(1 for _ in module.modules())


def _called(path: str, module: nn.Module) -> str:
    """The last module of a list: the list itself is never called."""
    if isinstance(module, nn.ModuleList) and len(module):
        return _called(f"{path}.{len(module) - 1}", module[-1])
    return path


def _timm() -> Iterator[Entry]:
    try:
        import timm
    except ImportError:
        return
    for name in timm.list_models():
        family = timm.model_entrypoint(name).__module__
        yield Entry(f"timm:{name}", functools.partial(timm.create_model, name), family=family)


def _torchvision() -> Iterator[Entry]:
    import torchvision.models as models

    for name in models.list_models():
        builder: Any = models.get_model_builder(name)
        family = str(builder.__module__)
        arguments: dict[str, Any] = {"weights": None}
        if "weights_backbone" in inspect.signature(builder).parameters:
            arguments["weights_backbone"] = None
        build = functools.partial(builder, **arguments)
        inputs = _torchvision_inputs(family)
        yield Entry(f"torchvision:{name}", build, inputs, family, real=inputs is not _no_inputs)


def _torchvision_inputs(family: str) -> Callable[[nn.Module], Mapping[str, Any] | None]:
    if "detection" in family:
        return _images_and_boxes
    return _two_frames if "optical_flow" in family else _no_inputs


def _images_and_boxes(model: nn.Module) -> Mapping[str, Any]:
    generator = torch.Generator().manual_seed(0)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 80, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }
    return {
        "images": [torch.rand(3, 64, 80, generator=generator) for _ in range(2)],
        "targets": [dict(target) for _ in range(2)],
    }


def _two_frames(model: nn.Module) -> Mapping[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 3, 128, 128, generator=generator) for name in ("image1", "image2")}
