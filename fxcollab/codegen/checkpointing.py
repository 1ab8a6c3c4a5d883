"""Gradient checkpointing by the original's own methods, such as ``set_grad_checkpointing`` of timm, for all branches.

Such a method sets attributes of modules. What it sets is set in the peers too, so that modules kept whole compute
again what they do in the original. A module that was opened doesn't run any more: instead, those that it calls are
each computed again (see `recompute`), except single layers, which keep hardly more than their inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxcollab.errors import StateError
from fxcollab.fx_utils import opened_around
from fxcollab.tree import original_name


def on_all_branches(method: Callable[..., Any], train_model: Any, peers: str) -> Callable[..., Any]:
    """A method of the original that switches gradient checkpointing, for a training model."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _recorded_writes() as writes:
            result = method(*args, **kwargs)
        originals = dict(train_model.root.named_modules(remove_duplicate=False))
        for name, part in train_model.get_submodule(peers).named_modules(prefix=peers, remove_duplicate=False):
            origin = originals.get(original_name(name, peers=peers))
            for module, attribute, value in writes if type(part) is type(origin) else ():
                if module is origin:
                    setattr(part, attribute, value)
        train_model.accept({(module, attribute) for module, attribute, _ in writes})
        switched = {id(module): value for module, _, value in writes if isinstance(value, bool)}
        on = {name for name, module in originals.items() if switched.get(id(module))}
        called = {str(node.target) for node in train_model.modes.train.nodes if node.op == "call_module"}
        again = _called_by(on, called, train_model, peers)
        if on and not again and not any(f"{name}.".startswith(f"{target}.") for name in on for target in called):
            raise StateError(
                "Gradient checkpointing would have no effect.",
                why="the modules that would compute again what they call are opened down to single layers",
                hint="transform with granularity='auto', or with recompute='heads'",
            )
        train_model.recompute_modules(again)
        return result

    return call


def _called_by(switched_on: set[str], called: set[str], train_model: Any, peers: str) -> frozenset[str]:
    """The ``called`` modules that opened ones call which are switched on, while none inside them is."""
    names = {target: original_name(target, peers=peers) for target in called}
    opened = switched_on & {"", *opened_around(names.values())}
    innermost = [outer for outer in opened if not any(_is_inside(inner, outer) for inner in switched_on)]
    return frozenset(
        target
        for target, name in names.items()
        if any(_is_inside(name, outer) for outer in innermost)
        and next(train_model.get_submodule(target).children(), None) is not None
    )


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and f"{name}.".startswith(f"{outer}." if outer else "")


@contextmanager
def _recorded_writes() -> Iterator[list[tuple[nn.Module, str, Any]]]:
    """All attributes that modules are given meanwhile, also those that are as they were."""
    found = list[tuple[nn.Module, str, Any]]()

    def record(module: nn.Module, name: str, value: Any) -> None:
        found.append((module, name, value))
        original(module, name, value)

    with _ONE_AT_A_TIME:  # each restores what it found
        original = nn.Module.__setattr__
        nn.Module.__setattr__ = record  # type: ignore[method-assign,assignment]
        try:
            yield found
        finally:
            nn.Module.__setattr__ = original  # type: ignore[method-assign]


_ONE_AT_A_TIME = threading.Lock()
