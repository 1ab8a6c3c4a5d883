"""Which modules to open in search of splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def opened(
    model: nn.Module,
    interface: Interface,
    example_inputs: ExampleInputs | None,
    granularity: Granularity,
    depth: int | None,
) -> CollabGraphModule:
    """``model``, captured with those modules opened between whose parts a good split may lie.

    Args:
        model: any module.
        interface: its inputs, of known shapes.
        example_inputs: what answers the questions of opened forwards.
        granularity: as for `capture`.
        depth: open all modules down to so many levels below the root; by default those that do more than an eighth
            of the work.

    Raises:
        CaptureError: the model's own forward can't be captured.
    """
    if is_open(model, granularity):
        return capture(model, (), example_inputs, granularity, interface=interface)
    paths = list(_within(model, depth) if depth is not None else _large(model, interface))

    def attempt(chosen: Iterable[str]) -> CollabGraphModule:
        insides = [_inside(model, path) for path in chosen]
        return capture(model, insides, example_inputs, granularity, interface=interface)

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


def is_open(model: nn.Module, granularity: Granularity) -> bool:
    """Whether every capture of ``model`` gives the same graph, whatever the splits."""
    return granularity == "op" or isinstance(model, fx.GraphModule)


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
