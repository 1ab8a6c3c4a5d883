"""What is said of the original, said of all branches: groups of parameters, plans of tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fxcollab.arguments import checked
from fxcollab.errors import StateError, closest
from fxcollab.plan import unwrapped
from fxcollab.tree import original_name


@checked
def parameter_groups(train_model: nn.Module, groups: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups of the original's parameters, with every peer's parameter in the group of its original.

    Args:
        train_model: what `transform`, `load` or `spread` returned, or a wrapper around it.
        groups: as for an optimizer of the original: dicts with tensors, names, or pairs of both under ``params``; or
            the parameters of one group.

    Returns:
        New groups of tensors, with all other entries as they are.

    Raises:
        StateError: it is not a training model, or a group holds something else than its parameters.
    """
    model = unwrapped(train_model)
    branches: dict[str, list[Tensor]] = {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = original_name(name, peers=model.name_of_peers)
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

    given: list[Any] = [groups] if isinstance(groups, Tensor | str) else list(groups)
    if not all(isinstance(group, Mapping) for group in given):
        given = [{"params": given}]
    if not all("params" in group for group in given):
        raise StateError(
            "A group has no 'params'.", hint="give dicts as for an optimizer: {'params': [...], 'lr': 0.1}"
        )
    return [{**group, "params": list(of_all_branches(group["params"]))} for group in given]


@checked
def parallel_plan(train_model: nn.Module, plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan of tensor parallelism for all branches, of one for the original.

    Args:
        train_model: what `transform`, `load` or `spread` returned, or a wrapper around it.
        plan: as for ``torch.distributed.tensor.parallel.parallelize_module``: styles by names of the original's
            modules, with ``*`` for any part of a path.

    Returns:
        The styles by names of the training model's modules, for ``parallelize_module(train_model, mesh, plan)``.

    Raises:
        StateError: no module has such a name, or one was opened, so that a style's hooks would never be called.
    """
    model = unwrapped(train_model)
    calls = {str(node.target) for graph in model.modes for node in graph.nodes if node.op == "call_module"}
    names = {name: original_name(name, peers=model.name_of_peers).split(".") for name, _ in model.named_modules()}
    found: dict[str, Any] = {}
    for pattern, style in plan.items():
        atoms = str(pattern).split(".")
        fits = [name for name, own in names.items() if len(own) == len(atoms) and all(map(fnmatchcase, own, atoms))]
        opened = [name for name in fits if any(call.startswith(f"{name}.") for call in calls)]
        if not fits or opened:
            raise StateError(
                f"{pattern!r} is not a module that the training graph calls.",
                where=", ".join(opened[:3]) or None,
                why="a split lies inside, so that its parts are called" if opened else "there is none of that name",
                hint="name the modules in it" if opened else "give names of the original's named_modules()",
            )
        found.update((name, style) for name in fits if any(f"{name}.".startswith(f"{call}.") for call in calls))
    return found
