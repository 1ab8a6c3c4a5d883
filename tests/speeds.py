"""Which parameters of a test are left to the slower run; ``tests/README.md`` says what belongs there."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], values: Iterable[Any], mark: Any = pytest.mark.slow) -> list[Any]:
    """The values of a parametrisation, all of them marked as slow but those that ``fast`` names.

    A value of several arguments, or with an id, is a ``pytest.param``, which ``fast`` names by its id or first value.
    """
    parameters, found = [], []
    for value in values:
        parameter = value if hasattr(value, "marks") else pytest.param(value)
        names = [name for name in (parameter.id, parameter.values[0]) if any(name is f or name == f for f in fast)]
        found += names
        marks = parameter.marks if names else [*parameter.marks, mark]
        parameters.append(pytest.param(*parameter.values, id=parameter.id, marks=marks))
    assert len(found) >= len(fast), f"not all of {fast} are parameters"
    return parameters
