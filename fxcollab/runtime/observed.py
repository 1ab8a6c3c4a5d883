"""What a branch writes beside buffers, observed: what its modules hold is compared before and after its first call.

Attributes of modules and of their classes are compared with all that can be reached from them; see `Contents`.
Closures and globals are not looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fxcollab._torch import version_of
from fxcollab.contents import Contents
from fxcollab.errors import StateError
from fxcollab.fx_utils import OF_EVERY_MODULE
from fxcollab.runtime.functional_call import parts_of

Stateful: TypeAlias = nn.Module | tuple[nn.Module, str]
"""A module with all its state, or one tensor by its name in a module."""

_RESULT = "a result with a graph, as hooks of torch leave for the forward; set again for the second pass"
_OBSERVED: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


def modules_in(stateful: Iterable[Stateful]) -> list[nn.Module]:
    """All modules in ``stateful``, each once."""
    parts = (parts_of(one) if isinstance(one, nn.Module) else one[:1] for one in stateful)
    return list(dict.fromkeys(part for some in parts for part in some))


def version(tensor: Tensor) -> int:
    """The tensor's version counter; 0 where there is none to read, as of inference tensors."""
    return version_of(tensor)


@contextmanager
def observed(branch: Callable[..., Any], stateful: Sequence[Stateful], parts: Sequence[nn.Module]) -> Iterator[None]:
    """A context around a call of a branch; where it is the first one in these modes, what it writes is observed.

    Raises:
        StateError: it changed something else than parameters and buffers of its modules.
    """
    key = branch.__code__, *(part.training for part in parts)
    if not parts or key in _OBSERVED.setdefault(parts[0], set()):
        yield
        return
    contents = Contents({id(part) for part in parts})
    before = _contents(stateful, contents)
    yield
    after = _contents(stateful, contents)
    for owner, name in {**before, **after}:
        found, then = before.get((owner, name), ""), after.get((owner, name), "")
        if found is None or found != then != _RESULT:
            raise StateError(
                "A branch can't be computed again: its forward keeps something beside buffers.",
                where=f"{branch.__name__}, {(owner if isinstance(owner, type) else type(owner)).__qualname__}.{name}",
                why="an iterator in it may move on"
                if found is None
                else "only buffers are the same in the second pass",
                hint="keep it in a buffer (register_buffer), or transform without recompute; where only the first "
                "call sets it, call the model once before",
            )
    _OBSERVED[parts[0]].add(key)


def _contents(stateful: Sequence[Stateful], contents: Contents) -> dict[tuple[Any, str], Any]:
    """What each attribute holds, by its owner and name; None where it has an iterator that can't be read."""
    found: dict[tuple[Any, str], Any] = {}
    for owner, name, value in _attributes(stateful):
        if (owner, name) not in found:
            is_result = isinstance(value, Tensor) and value.grad_fn is not None
            found[owner, name] = _RESULT if is_result else contents.of(value)
    return found


def _attributes(stateful: Sequence[Stateful]) -> Iterator[tuple[Any, str, Any]]:
    for one in stateful:
        if isinstance(one, tuple):
            owner, name = one
            if name in vars(owner):
                yield owner, name, vars(owner)[name]
            continue
        for part in parts_of(one):
            yield from ((part, name, value) for name, value in vars(part).items() if name not in OF_EVERY_MODULE)
            for cls in type(part).__mro__:
                if cls.__module__.partition(".")[0] not in ("torch", "builtins", "fxcollab"):
                    yield from ((cls, name, value) for name, value in vars(cls).items() if not name.startswith("__"))
