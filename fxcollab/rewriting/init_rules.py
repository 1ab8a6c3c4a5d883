"""Which of the peers' tensors start fresh, and which as copies of the given model's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from fxcollab.errors import PatternError, closest
from fxcollab.functional import tensors_of

InitFunction = Callable[[nn.Module, str], None]
Init = str | Mapping[str, Literal["fresh", "copy"]] | InitFunction
_ENOUGH, _ALIKE = 1000, (0.8, 1.25)
"""Of so many values the spreads of two draws differ by less, by seven deviations."""
INITS = ("fresh", "copy", "copy-anyway", "finetune")


def check_init(init: Init) -> None:
    """Raise a PatternError for an ``init`` that doesn't exist."""
    if callable(init):
        return
    wrong = [] if init in INITS else [init]
    if rules := rules_of(init):
        wrong = [value for value in rules.values() if value not in ("fresh", "copy")]
        wrong += [pattern for pattern in rules if not isinstance(pattern, str)]
    if wrong:
        raise PatternError(
            f"There is no init {wrong[0]!r}.",
            hint=f"use one of {', '.join(INITS)}, a dict such as {{'fc': 'fresh', '*': 'copy'}} (--init copy "
            "--fresh fc), or a callable(module, path)",
        )


def rules_of(init: Init) -> Mapping[str, str]:
    """Rules by pattern, of a dict or of its text ``fc=fresh,*=copy``; none for the other kinds of ``init``."""
    if isinstance(init, Mapping):
        return init
    if not isinstance(init, str) or "=" not in init:
        return {}
    pairs = (rule.rpartition("=") for rule in init.split(","))
    return {pattern.strip(): value.strip() for pattern, _, value in pairs}


def name_of(init: Init) -> str:
    """The text of an ``init`` for a plan."""
    if rules := rules_of(init):
        return ",".join(f"{pattern}={value}" for pattern, value in rules.items())
    return init if isinstance(init, str) else getattr(init, "__qualname__", repr(init))


def described(init: Init, frozen: int) -> str:
    """How heads start, in a sentence; ``frozen`` is how many parameters of peers don't learn."""
    if rules_of(init):
        starts = f"heads other than 0 start by {name_of(init)}"
    elif init == "fresh":
        starts = "only head 0 has the given weights behind the splits, the others start anew"
    elif init == "finetune":
        starts = "all heads have the given weights, except for the last layers of all but head 0"
    elif init in INITS:
        starts = "all heads have the given weights"
    else:
        starts = f"heads other than 0 start as {name_of(init)} makes them"
    return f"{starts}; {frozen} frozen parameters are copies" if frozen else starts


def fresh_names(init: Init, root: nn.Module, duplicated: Collection[str], last: Collection[str]) -> set[str]:
    """The names of tensors behind the splits that start fresh; `always_copied` ones never do.

    Args:
        init: as for `transform`, but no function.
        root: the model.
        duplicated: the names of the tensors of which peers exist.
        last: of these, the parameters of the last layer.

    Raises:
        PatternError: a rule names nothing behind the splits.
    """
    if rules := rules_of(init):
        _refuse_unused(rules, duplicated)
        chosen = {name for name in duplicated if _rule_for(name, rules) == "fresh"}
    else:
        chosen = {"fresh": set(duplicated), "finetune": set(last)}.get(str(init), set())
    tensors = tensors_of(root)
    ids = {id(tensors[name]) for name in chosen}
    under_all_names = {name for name in duplicated if id(tensors[name]) in ids}
    return under_all_names - always_copied(root)


def always_copied(root: nn.Module) -> set[str]:
    """What is frozen, with its buffers, and buffers that no state dict has.

    Frozen are parameters that need no gradient; of modules whose parameters are all such, so are the buffers. What
    no state dict has must be the same in all heads, since their states are loaded into one model.
    """
    found: set[str] = set()
    for path, module in root.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        prefix = f"{path}." if path else ""
        found |= {prefix + name for name, parameter in own.items() if not parameter.requires_grad}
        found |= {prefix + name for name in module._non_persistent_buffers_set}
        around = path
        while not (parameters := list(own.values()) or list(root.get_submodule(around).parameters())) and around:
            around = around.rpartition(".")[0]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            found |= {prefix + name for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)}
    return found


def equal_heads(init: Init) -> PatternError:
    """The error where all heads start equal, and stay so as nothing behind a split draws random numbers."""
    what, way_out = "Peers that start as copies would never differ from head 0.", "init='fresh'"
    if init == "fresh":
        what = "Peers would never differ from head 0: what learns behind the splits starts as constants."
        way_out = "let a layer behind the splits learn that starts at random, init=callable(module, path)"
    elif init == "finetune":
        way_out = (
            f"name layers that start anew: init={{'fc': 'fresh', '*': 'copy'}} (--init copy --fresh fc), {way_out}"
        )
    else:
        way_out = f"use init='finetune' (--init finetune), which redraws the heads' last layers, {way_out}"
    return PatternError(
        what,
        why="no operation behind the splits draws random numbers, so all heads would stay equal",
        hint=f"{way_out}, or 'copy-anyway' if you make them differ yourself",
    )


def looks_trained(fresh: Mapping[str, Tensor], root: Mapping[str, Tensor]) -> str | None:
    """The first tensor that starts as a constant and isn't one any more in the given model; None if there is none."""
    for name, tensor in fresh.items():
        own = root[name]
        if tensor.is_meta or own.is_meta or tensor.numel() < 2 or not tensor.is_floating_point():
            continue
        if is_constant(tensor) and not is_constant(own):
            return name
    return None


def starts_otherwise(fresh: Mapping[str, Tensor], root: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is a constant in one of the two alone, or has another spread; None if there is none."""
    for name, tensor in fresh.items():
        own = root[name]
        if tensor.is_meta or own.is_meta or tensor.numel() < 2 or not tensor.is_floating_point():
            continue
        if is_constant(own) or is_constant(tensor):
            if not torch.equal(own.detach().cpu(), tensor.detach().cpu()):
                return name
        elif tensor.numel() >= _ENOUGH:
            ratio = own.detach().double().std() / tensor.detach().double().std()
            if not _ALIKE[0] < ratio < _ALIKE[1]:
                return name
    return None


def is_constant(tensor: Tensor) -> bool:
    """Whether all elements are equal; on meta that isn't known."""
    flat = tensor.detach().flatten()
    return not tensor.is_meta and (len(flat) < 2 or bool((flat == flat[0]).all()))


def _rule_for(name: str, rules: Mapping[str, str]) -> str:
    """The first rule whose pattern is the name, the path of a module around it, or a glob of either."""
    for pattern, value in rules.items():
        if _matches(pattern, name):
            return value
    raise PatternError(f"No rule of init says how {name} starts.", hint="end with one for all others: '*': 'copy'")


def _matches(pattern: str, name: str) -> bool:
    atoms = name.split(".")
    paths = [".".join(atoms[:count]) for count in range(1, len(atoms) + 1)]
    return pattern in paths or any(fnmatchcase(path, pattern) for path in paths)


def _refuse_unused(rules: Mapping[str, str], duplicated: Collection[str]) -> None:
    for pattern in rules:
        if not any(_matches(pattern, name) for name in duplicated):
            near = closest(pattern, sorted({name.rpartition(".")[0] for name in duplicated} | set(duplicated)))
            raise PatternError(
                f"No tensor behind the splits matches {pattern!r}.",
                why="init names modules or tensors of which every branch has its own",
                hint=f"did you mean {near}?" if near else "name a module behind a split, or '*' for all others",
            )
