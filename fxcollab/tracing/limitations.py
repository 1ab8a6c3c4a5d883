"""What capturing gives up: said before training, not found out after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fxcollab.tracing.interface import Interface

_BACKWARD_HOOKS = {"_backward_hooks": "backward hooks", "_backward_pre_hooks": "backward pre-hooks"}
_FORWARD_HOOKS = {"_forward_hooks": "forward hooks", "_forward_pre_hooks": "forward pre-hooks"}
_HOOKS = {**_FORWARD_HOOKS, **_BACKWARD_HOOKS}


def limitations(opened: dict[str, nn.Module], interface: Interface) -> tuple[str, ...]:
    """What the captured graph no longer does, one sentence each.

    Args:
        opened: the modules that were traced into, by path; "" is the root.
        interface: the inputs, and what is fixed.
    """
    return (*_hooks(opened), *_fixed(interface))


def shared_statistics(buffers: Iterable[str]) -> tuple[str, ...]:
    """What is said of buffers that are used before and behind a split, such as a shared BatchNorm's."""
    names = sorted(buffers)
    if not names:
        return ()
    return (
        f"buffers {', '.join(names[:4])}{' and more' if len(names) > 4 else ''} are used before and behind a split: "
        "all branches share them, and each call behind the split updates them",
    )


def _hooks(opened: dict[str, nn.Module]) -> Iterator[str]:
    """Of the root none run; those of modules inside are traced through, except backwards."""
    for path, module in sorted(opened.items()):
        lost = _HOOKS if path == "" else _BACKWARD_HOOKS
        found = [label for attribute, label in lost.items() if getattr(module, attribute, None)]
        if found:
            yield (
                f"{' and '.join(found)} of {path or 'the root'} don't run: the module was opened "
                "(hooks of modules that are kept whole do run)"
            )
        if path and any(not _is_of_torch(hook) for name in _FORWARD_HOOKS for hook in getattr(module, name).values()):
            yield (
                f"forward hooks of {path} ran once, while it was captured: what they compute is in the graph, what "
                "else they do (store, print) is not"
            )


def _is_of_torch(hook: Any) -> bool:
    """Such as that of ``weight_norm``, which computes and does nothing else."""
    return type(hook).__module__.startswith("torch.") or getattr(hook, "__module__", "").startswith("torch.")


def _fixed(interface: Interface) -> Iterator[str]:
    if interface.defaults:
        yield (
            f"optional inputs {', '.join(interface.defaults)} are fixed at their defaults "
            "(give them in example_inputs to keep them)"
        )
    if interface.fixed:
        yield f"inputs {', '.join(f'{name}={value!r}' for name, value in interface.fixed)} are fixed as given"
