"""The models of the zoo, with the splits that each library's own stage names suggest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """A model: where it is from, how it is made, and where it splits."""

    name: str
    library: str
    build: Callable[[], nn.Module]

    def splits(self, model: nn.Module) -> Sequence[str]:
        """Two splits, at about a third and two thirds of the model's stages."""
        stages = stages_of(model)
        return (stages[(len(stages) - 1) // 3], stages[max(2 * (len(stages) - 1) // 3, (len(stages) - 1) // 3 + 1)])


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All models of the libraries that are installed."""
    return (*_timm(), *_torchvision())


def stages_of(model: nn.Module) -> list[str]:
    """The stages of a model in order: those it names itself, else the children of its longest sequence."""
    named = [info["module"] for info in getattr(model, "feature_info", None) or () if isinstance(info, dict)]
    modules = dict(model.named_modules())
    named = [_called(name, modules[name]) for name in dict.fromkeys(named) if name in modules]
    if len(named) >= 3:
        return named
    sequences = [
        (len(module._modules), -path.count("."), path)
        for path, module in modules.items()
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module._modules) >= 3
    ]
    if sequences:
        _, _, path = max(sequences, key=lambda s: (s[1], s[0]))
        return [f"{path}.{name}" if path else name for name in modules[path]._modules]
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    return [_called(name, modules[name]) for name in children]


def _called(path: str, module: nn.Module) -> str:
    """The last module of a list: the list itself is never called."""
    if isinstance(module, nn.ModuleList) and len(module):
        return f"{path}.{len(module) - 1}"
    return path


def _timm() -> Iterator[Entry]:
    try:
        import timm
    except ImportError:
        return
    for name in timm.list_models():
        yield Entry(f"timm:{name}", "timm", functools.partial(timm.create_model, name))


def _torchvision() -> Iterator[Entry]:
    import torchvision.models as models

    for name in models.list_models():
        arguments: dict[str, Any] = {"weights": None}
        if any(part in name for part in ("segmentation", "detection", "deeplab", "fcn", "rcnn", "retina", "ssd")):
            arguments["weights_backbone"] = None
        yield Entry(f"torchvision:{name}", "torchvision", functools.partial(models.get_model, name, **arguments))
