"""Functions that captured graphs call where ``torch.fx`` has no faithful node of its own.

``x += y`` on a proxy silently becomes ``x = x + y``: buffers and aliases are no longer written. A node that calls
``operator.iadd`` doesn't help, since fx prints it as a statement that also rebinds plain numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, ItemsView, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fxcollab._torch import pytree, runtime_check, version_of
from fxcollab.deep_copy import parts_of_value
from fxcollab.errors import CaptureError, GuardError, StateError


def _inplace(name: str) -> Callable[[Any, Any], Any]:
    operation = getattr(operator, name)

    def inplace(value: Any, other: Any) -> Any:
        return operation(value, other)

    inplace.__name__ = inplace.__qualname__ = name
    inplace.__doc__ = f"``operator.{name}``: writes into a tensor, makes a new number."
    return inplace


INPLACE: dict[str, Callable[[Any, Any], Any]] = {
    name: _inplace(name)
    for name in (
        "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
        "itruediv", "ixor",
    )
}  # fmt: skip
"""The in-place operators by their names in `operator`."""
globals().update(INPLACE)  # for pickles, which look functions up by their names


def writes_in_place(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of ``target``, a function or the name of a method, returns its first argument, written to."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__")
    return by_name or target in INPLACE.values() or kwargs.get("inplace") is True


@dataclass(frozen=True)
class CustomFunction:
    """A custom ``autograd.Function`` as the target of a node; traced through, it would lose its backward.

    Attributes:
        function: the subclass of ``torch.autograd.Function``.
    """

    function: Any

    @property
    def __name__(self) -> str:
        """What fx names the node after."""
        name: str = self.function.__name__
        return name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply it."""
        return self.function.apply(*args, **kwargs)


@dataclass(frozen=True)
class ReadsOnly:
    """A function as the target of a node: raises where it writes into arguments into which it was not seen to write.

    Other nodes use what the function is given, and would not all see the write. Writes through ``.data``, and into
    tensors that were made in inference mode, are not seen, as torch doesn't count them.

    Attributes:
        function: a Python function that asks about its arguments, and may do otherwise for others.
        read: places and names of the arguments into which it must not write.
    """

    function: Any
    read: tuple[int | str, ...]

    @property
    def __name__(self) -> str:
        """What fx names the node after."""
        name: str = self.function.__name__
        return name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        Raises:
            StateError: it wrote into an argument.
        """
        read = [value for key, value in (*enumerate(args), *kwargs.items()) if key in self.read]
        held, versions = _contents(read)
        result = self.function(*args, **kwargs)
        held_then, versions_then = _contents(read)
        if torch.compiler.is_compiling() and held == held_then:  # where versions are symbols
            for one, other in zip(versions, versions_then, strict=True):
                runtime_check(one == other, lambda: "A function writes into what it is given.")
        elif (held, versions) != (held_then, versions_then):
            raise StateError(
                f"{self.__name__}() writes into what it is given, which it didn't when the model was transformed.",
                where=f"{self.function.__module__}.{self.function.__qualname__}",
                why="what it is given is used before and behind a split, and not all that use it would see the write",
                hint="transform with example_inputs for which it writes; or let it return a new value instead",
            )
        return result


def _contents(value: Any) -> tuple[Any, list[int]]:
    """How a value is built and which objects it holds, and how often each tensor in it was written.

    Unlike `Contents`, which compiled code can't trace, and which is for all that modules hold.
    """
    leaves, structure = pytree.tree_flatten(value)
    if torch.compiler.is_compiling():  # which knows no identities
        return structure, [version_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    parts = [part for leaf in leaves for part in parts_of_value(leaf)]
    versions = [version_of(part) for part in parts if isinstance(part, Tensor)]
    return (structure, [id(part) for part in parts]), versions


GRADIENT_METHODS = frozenset(("register_hook", "register_post_accumulate_grad_hook", "retain_grad"))
"""Names of methods that concern a tensor's gradient alone."""


@dataclass(frozen=True, eq=False)
class GradientMethod:
    """One of `GRADIENT_METHODS` as the target of a node; it does nothing where there is no gradient.

    Attributes:
        name: the method.
        arguments: its arguments, such as a hook, which a node can't have as arguments.
    """

    name: str
    arguments: tuple[Any, ...]

    @property
    def __name__(self) -> str:
        """What fx names the node after: it changes its argument, so that every head needs one of its own."""
        return f"{self.name}_"

    @property
    def description(self) -> tuple[Any, ...]:
        """Equal for the same call in two traces, where a hook that the forward defines is another function."""
        return self.name, _description(self.arguments, ())

    def __call__(self, tensor: Tensor) -> Any:
        """Call it."""
        return getattr(tensor, self.name)(*self.arguments) if tensor.requires_grad else None


def _description(value: Any, around: tuple[int, ...]) -> Any:
    """What a value is: of functions and containers what they hold, of other objects the identity."""
    if id(value) in around:
        return around.index(id(value))
    inner = (*around, id(value))
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return value.__code__, _description([value.__defaults__, value.__kwdefaults__, *cells], inner)
    if isinstance(value, MethodType):
        return id(value.__self__), _description(value.__func__, inner)
    if isinstance(value, partial):
        return partial, _description([value.func, value.args, value.keywords], inner)
    if isinstance(value, tuple | list):
        return type(value), *(_description(part, inner) for part in value)
    if isinstance(value, dict):
        return dict, *((_description(key, inner), _description(part, inner)) for key, part in value.items())
    return (type(value), value) if isinstance(value, bool | int | float | str | None) else id(value)


def stop_gradient(value: Any, kept: Sequence[Any] = ()) -> Any:
    """``value``, a tensor or any pytree, as under ``torch.no_grad()``: the same storage, no gradient.

    ``kept`` are the arguments of the operation that returned ``value``: if it returned one, that keeps its gradient.
    """
    if has_torch_function_unary(value):
        return handle_torch_function(stop_gradient, (value,), value, kept)

    given = pytree.tree_leaves(list(kept))

    def stopped(leaf: Any) -> Any:
        keeps = not isinstance(leaf, Tensor) or not leaf.requires_grad or any(leaf is one for one in given)
        return leaf if keeps else leaf.detach()

    return pytree.tree_map(stopped, value)


def set_data_(tensor: Tensor, value: Tensor) -> Tensor:
    """``tensor.data = value``, written into the memory that the tensor has.

    Raises:
        CaptureError: the value has another shape or type.
    """
    if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
        raise CaptureError(
            f"{tuple(value.shape)} of {value.dtype} is assigned to the data of a tensor of {tuple(tensor.shape)} and "
            f"{tensor.dtype}.",
            why="the graph writes into the memory that the tensor has",
            hint="assign a value of the same shape and type, or keep this code in a module of its own",
        )
    return tensor.data.copy_(value)


def guard(question: str, value: Any, answer: Any, where: str) -> None:
    """Raise for a value for which the forward would take a different branch than when it was captured.

    One of `QUESTIONS` about the value had the given answer at capture; ``where`` is the line with the question. A
    value that requires no grad, as under ``torch.no_grad()``, goes the way of one that does.

    Raises:
        GuardError: the answer differs.
    """
    found = QUESTIONS[question](value)
    if question == "requires grad" and not found:
        return
    # of a symbolic truth value, in compiled code with dynamic sizes, only this can be asked
    differs = (not found if answer else bool(found)) if type(answer) is bool else found != answer
    if differs:
        given = "is given" if question == "is None" and found else question
        hint = _HINTS.get(given, "capture with an example like this input; or")
        asked = f"'... {question}'" if " " in question else f"{question}(...)"
        raise GuardError(
            f"The graph was captured where {asked} is {answer}; here it is {found}.",
            where=where,
            why="the forward takes a different branch for this input",
            hint=f"{hint} keep this code in a module of its own, which becomes one node",
        )


_NUMBER = "x.item() stays the number of the input at hand, which int(x) and float(x) do not; or"
_LOOP = "a loop is as long as for the example: give as many at every call (drop_last=True in a DataLoader); or"
_HINTS = {
    "int": _NUMBER, "float": _NUMBER, "len": _LOOP, "index": _LOOP, "keys": _LOOP,
    "is None": "leave it out, as the example did; or",
    "is given": "give it at every call, as the example did, or transform without it; or",
}  # fmt: skip


def _keys(value: Any) -> list[Any]:
    return [key for key, _ in value] if isinstance(value, ItemsView) else list(value)


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool, "int": int, "float": float, "index": operator.index, "len": len, "keys": _keys,
    "value": lambda value: tuple(value) if isinstance(value, torch.Size) else value,
    "is None": lambda value: value is None, "requires grad": bool,
}  # fmt: skip
"""Functions whose result depends on the value of a tensor, by name."""
