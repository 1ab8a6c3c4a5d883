"""Options of objectives that are numbers in a range, checked whenever they are set: a ramp is one assignment."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, cast, overload

from fxcollab.errors import ObjectiveError


class Number:
    """An attribute that is a plain number in a range, which ``must_be`` names."""

    def __init__(self, allowed: Callable[[Any], bool], *, must_be: str, why: str, hint: str, name: str = "") -> None:
        self._allowed, self._must_be, self._why, self._hint = allowed, must_be, why, hint
        self._name = name

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Number: ...
    @overload
    def __get__(self, instance: object, owner: type) -> float: ...
    def __get__(self, instance: object | None, owner: type) -> Number | float:
        return self if instance is None else cast(float, instance.__dict__[self._name])

    def __set__(self, instance: object, value: Any) -> None:
        """Set it.

        Raises:
            ObjectiveError: the value is not a number, or out of range.
        """
        instance.__dict__[self._name] = self.checked(value)

    def checked(self, value: Any) -> float:
        """The value as a float, if it is in range; for the errors see `__set__`."""
        if type(value) is bool or not isinstance(value, Real):
            raise ObjectiveError(
                f"{self._name} must be a number, not {value!r}.",
                hint="It is a constant of the objective and can't be learnt; of a tensor, pass tensor.item().",
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not self._allowed(number):
            raise ObjectiveError(
                f"{self._name} must be {self._must_be}, not {value}.", why=self._why, hint=self._hint
            )
        return number


def switch(name: str, value: object) -> bool:
    """The value itself, if it is True or False; else an `ObjectiveError`."""
    if not isinstance(value, bool):
        raise ObjectiveError(
            f"{name} must be True or False, not of type {type(value).__name__}.", hint=f"Write {name}=True."
        )
    return value


def temperature() -> Number:
    """T of equation 2: finite and above 0."""
    return Number(
        lambda value: value > 0 and value * value < math.inf,
        must_be="finite and above 0",
        why="The logits are divided by it (equation 2), and the loss multiplied by its square.",
        hint="The paper uses 2; 1 is the plain softmax.",
    )


def weight(of: str, against: str, hint: str = "1 is the usual choice.") -> Number:
    """The weight of one term against another: finite and at least 0."""
    return Number(
        lambda value: 0 <= value < math.inf,
        must_be="finite and at least 0",
        why=f"It weighs {of} against {against}.",
        hint=hint,
    )
