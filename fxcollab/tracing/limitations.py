"""Limitations of a captured graph, reported before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from fxcollab._torch import has_hooks
from fxcollab.functional import tensors_of
from fxcollab.tracing.interface import Interface

_BACKWARD_HOOKS = {"_backward_hooks": "backward hooks", "_backward_pre_hooks": "backward pre-hooks"}
_FORWARD_HOOKS = {"_forward_hooks": "forward hooks", "_forward_pre_hooks": "forward pre-hooks"}
_HOOKS = {**_FORWARD_HOOKS, **_BACKWARD_HOOKS}


def limitations(opened: Mapping[str, nn.Module], interface: Interface) -> Iterator[str]:
    """A sentence for each thing that the graph doesn't do; ``opened`` has the modules traced into, by path."""
    for path, module in sorted(opened.items()):
        yield from _hooks(path, module)
    root = opened[""]
    if getattr(root.load_state_dict, "__func__", None) is not nn.Module.load_state_dict:
        yield (
            f"load_state_dict of {type(root).__qualname__} is its own: checkpoints that it converts are loaded into "
            "the model itself, not into the training model"
        )
    if defaults := [name for name in interface.fixed_arguments(root) if name not in dict(interface.fixed)]:
        yield (
            f"optional inputs {', '.join(defaults)} are fixed at their defaults "
            "(tensors that example_inputs has for them become inputs)"
        )
    if interface.fixed:
        yield f"inputs {', '.join(f'{name}={value!r}' for name, value in interface.fixed)} are fixed as given"


def shared_statistics(buffers: Iterable[str]) -> tuple[str, ...]:
    """The sentence for buffers that are used before and behind a split, such as those of a shared BatchNorm."""
    names = sorted(buffers)
    if not names:
        return ()
    return (
        f"buffers {', '.join(names[:4])}{' and more' if len(names) > 4 else ''} are used before and behind a split: "
        "all branches share them, and each call behind the split updates them",
    )


def hooked_parameters(root: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """The sentence for parameters with hooks; ``names`` are those of which every head has one of its own."""
    tensors = tensors_of(root)
    hooked = [name for name in names if has_hooks(tensors[name])]
    if not hooked:
        return ()
    return (
        f"hooks on {', '.join(hooked[:4])}{' and more' if len(hooked) > 4 else ''} are those of head 0's parameters: "
        "register them on those of the other heads too, for which fxcollab.original_name tells the names",
    )


def _hooks(path: str, module: nn.Module) -> Iterator[str]:
    """No hooks of the root run (path ""); forward hooks of other opened modules are traced."""
    lost = _BACKWARD_HOOKS if path else _HOOKS
    found = [label for attribute, label in lost.items() if getattr(module, attribute, None)]
    if found:
        yield (
            f"{' and '.join(found)} of {path or 'the root'} don't run: the module was opened "
            "(hooks of leaf modules do run)"
        )
    if path and _has_forward_hooks(module):
        yield (
            f"forward hooks of {path} ran once, while it was captured: what they compute is in the graph, what "
            "else they do (store, print) is not"
        )


def hooked_modules(model: nn.Module) -> Iterator[str]:
    """The paths of the modules with forward hooks."""
    return (path for path, module in model.named_modules() if _has_forward_hooks(module))


def _has_forward_hooks(module: nn.Module) -> bool:
    return any(not _is_of_torch(hook) for name in _FORWARD_HOOKS for hook in getattr(module, name).values())


def _is_of_torch(hook: Any) -> bool:
    """Whether a hook is one such as that of ``weight_norm``, which only computes."""
    return type(hook).__module__.startswith("torch.") or getattr(hook, "__module__", "").startswith("torch.")
