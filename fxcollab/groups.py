"""Parameter groups for the optimizer of a training model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fxcollab.errors import StateError, closest
from fxcollab.plan import plan_of, training_model
from fxcollab.tree import original_name


def parameter_groups(train_model: nn.Module, groups: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups of the original's parameters, with every peer's parameter in the group of its original.

    Args:
        train_model: what `transform` or `load` returned, or a wrapper around it.
        groups: as for an optimizer of the original: dicts with tensors, names, or pairs of both under ``params``; or
            the parameters of one group.

    Returns:
        New groups of tensors, with all other entries as they are.

    Raises:
        StateError: it is not a training model, or a group holds something else than its parameters.
    """
    model = training_model(train_model)
    branches: dict[str, list[Tensor]] = {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = original_name(name, peers=plan_of(model).options.peers)
        branches.setdefault(key, []).append(parameter)
        names.setdefault(id(parameter), key)

    def named(entry: Any) -> str:
        entry = entry[0] if isinstance(entry, tuple) else entry
        name = names.get(id(entry)) if isinstance(entry, Tensor) else str(entry)
        if name not in branches:
            near = closest(str(name), branches) if name else None
            what = "a tensor that" if name is None else f"{name!r}, which"
            raise StateError(
                f"A group holds {what} is not a parameter of the model.",
                why="groups are those of the model that was transformed",
                hint=f"did you mean {near}?" if near else "give tensors or names of its named_parameters()",
            )
        return name

    def of_all_branches(params: Any) -> Iterator[Tensor]:
        entries = [params] if isinstance(params, Tensor | str) else list(params)
        found = (parameter for name in map(named, entries) for parameter in branches[name])
        yield from {id(parameter): parameter for parameter in found}.values()

    given = list(groups)
    if not all(isinstance(group, Mapping) for group in given):
        given = [{"params": given}]
    return [{**group, "params": list(of_all_branches(group["params"]))} for group in given]
