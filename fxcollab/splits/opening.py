"""Which modules to open in search of splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import ForwardError
from fxcollab.tracing.capture import Granularity, capture
from fxcollab.tracing.examples import run_on_fakes
from fxcollab.tracing.interface import ExampleInputs, Interface

LARGE = 1 / 8
"""Modules that do more than this share of all work are opened."""


@dataclass(frozen=True, eq=False)
class Searched:
    """A model in search of splits, and how it is captured.

    Attributes:
        model: any module.
        interface: its inputs, of known shapes.
        example_inputs: what answers the questions of opened forwards.
        granularity: as for `capture`.
    """

    model: nn.Module
    interface: Interface
    example_inputs: ExampleInputs | None
    granularity: Granularity

    @property
    def is_open(self) -> bool:
        """Whether every capture gives the same graph, whatever the splits."""
        return self.granularity == "op" or isinstance(self.model, fx.GraphModule)

    def capture(self, splits: Sequence[str] = ()) -> CollabGraphModule:
        """The model, opened as splits need it."""
        return capture(self.model, splits, self.example_inputs, self.granularity, interface=self.interface)


def opened(searched: Searched, depth: int | None) -> CollabGraphModule:
    """The model, captured with those modules opened between whose parts a good split may lie.

    Args:
        searched: the model.
        depth: open all modules down to so many levels below the root; by default those that do more than an eighth
            of the work.

    Raises:
        CaptureError: the model's own forward can't be captured.
    """
    if searched.is_open:
        return searched.capture()
    model = searched.model
    paths = list(_within(model, depth) if depth is not None else _large(model, searched.interface))

    def attempt(chosen: Iterable[str]) -> CollabGraphModule:
        return searched.capture([_inside(model, path) for path in chosen])

    try:
        return attempt(paths)
    except ForwardError:
        pass
    found, taken = attempt(()), list[str]()
    for path in paths:  # outer ones come first
        around = [outer for outer in paths if path.startswith(f"{outer}.")]
        if not around or max(around, key=len) in taken:
            try:
                found = attempt([*taken, path])
            except ForwardError:
                continue
            taken.append(path)
    return found


def _within(model: nn.Module, depth: int) -> Iterator[str]:
    for path, module in model.named_modules():
        if path and path.count(".") < depth and _can_be_opened(module):
            yield path


def _large(model: nn.Module, interface: Interface) -> Iterator[str]:
    """The paths of modules that do much of the work, outer ones first."""
    counter = FlopCounterMode(display=False)
    run_on_fakes(model, interface, counter)
    total = counter.get_total_flops()
    flops = counter.get_flop_counts().items()
    work = {name.partition(".model.")[2]: sum(counts.values()) for name, counts in flops}
    for path, module in model.named_modules():
        if path and work.get(path, 0) > LARGE * total and _can_be_opened(module):
            yield path


def _can_be_opened(module: nn.Module) -> bool:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    of_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, containers)
    whole = isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_checkpoint_wrapped_module")
    return any(True for _ in module.children()) and not of_torch and not whole


def _inside(model: nn.Module, path: str) -> str:
    """A name that makes `capture` open the module at ``path``."""
    child = next(name for name, _ in model.get_submodule(path).named_children())
    return f"{path}.{child}"
