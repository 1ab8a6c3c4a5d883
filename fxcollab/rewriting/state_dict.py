"""State dicts of training models: which entries make up one head, under its original names."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fxcollab.arguments import checked
from fxcollab.errors import MixedError, PatternError, StateError
from fxcollab.tree import HeadTree, Path, branch_and_name, branch_name, parse_branch_name

_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
NAMES = "fxcollab.names"
"""Where branches and metadata have the names of a branch's state."""
_EXTRA_STATE = "_extra_state"
"""Ends the keys under which modules keep state of any type."""


@checked
def prune_state_dict(checkpoint: Mapping[str, Any], head: int = 0, *, peers: str = "peers") -> dict[str, Any]:
    """The state dict of one head under the original's names and in its order; needs no model.

    Head 0 is what is left without the peers. For another head, the peers of its branches take the place of
    their originals. Prefixes that wrappers add (``module.``, ``_orig_mod.``, Lightning's ``net.``) are removed.

    Args:
        checkpoint: the state dict of a training model, or one wrapped by DDP, ``torch.compile``,
            ``AveragedModel`` or checkpointing.
        head: the head to keep (default 0).
        peers: the name under which peers live.

    Returns:
        A new dict with the checkpoint's own values; the original model loads it with ``strict=True``.

    Raises:
        StateError: it is not a state dict, or has no peers.
        MixedError: it lacks a tensor of the head, as far as its own names and metadata tell; or a tensor has another
            shape or type than the one whose place it takes.
        PatternError: there is no such head.
    """
    state = unwrapped(checkpoint, peers)
    names = prune_names(state, head, peers=peers)
    _refuse_mixed(state, names, _recorded(checkpoint, peers), peers)
    pruned = OrderedDict((name, state[key]) for name, key in names.items())
    if versions := _versions(checkpoint, peers):
        vars(pruned)["_metadata"] = versions
    return pruned


def _versions(checkpoint: Any, peers: str) -> dict[str, Any]:
    """The versions of the modules' formats, by which old ones are converted, as torch keeps them beside a state."""
    metadata = getattr(checkpoint, "_metadata", None)
    if not isinstance(metadata, Mapping):
        return {}
    names = [without_infixes(str(name)) for name in metadata]
    inner = [name.rpartition(f"{peers}.")[0] for name in names if parse_branch_name(name.rpartition(f"{peers}.")[2])]
    prefix = min(inner, key=len, default="")
    pairs = (
        (name, entry) for name, entry in zip(names, metadata.values(), strict=True) if f"{name}.".startswith(prefix)
    )
    own = {f"{name}."[len(prefix) :].rstrip("."): entry for name, entry in pairs}
    return {name: entry for name, entry in own.items() if name != peers and not name.startswith(f"{peers}.")}


def record_names(module: Any, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """A hook of `state_dict` by which the metadata say which names a branch was made with: a lost one is noticed."""
    own = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    metadata[NAMES] = list(vars(module).get(NAMES, own))


def _recorded(checkpoint: Any, peers: str) -> dict[Path, set[str]]:
    """The names of every branch, where the metadata of `record_names` are there."""
    found = {}
    metadata = getattr(checkpoint, "_metadata", None)
    for module, of_module in metadata.items() if isinstance(metadata, Mapping) else ():
        path = parse_branch_name(str(module).rpartition(f"{peers}.")[2])
        names = of_module.get(NAMES) if isinstance(of_module, Mapping) else None
        if path is not None and isinstance(names, list):
            found[path] = {without_infixes(str(name)) for name in names}
    return found


def _refuse_mixed(
    state: Mapping[str, Any], names: Mapping[str, str], recorded: Mapping[Path, set[str]], peers: str
) -> None:
    """Raise where a head would get tensors of another, or tensors that don't fit.

    All branches of a level have the same names. Where a level has one branch with peers and nothing is recorded, a
    module at the end of the tree is taken to be whole: where one of its tensors has peers, the others do.
    """
    branches: dict[Path, set[str]] = {}
    original: set[str] = set()
    for key in state:
        path, name = branch_and_name(key, peers)
        (branches.setdefault(path, set()) if path else original).add(name)
    modules = sorted({f"{_parent(key)}." for key in original})
    missing = [name for found in branches.values() for name in found if name not in original]
    missing += [f"{peers}.{branch_name(path)}" for path, lost in recorded.items() if lost and path not in branches]
    for path in {branch_and_name(key, peers)[0] for key in names.values()} - {()}:
        expected = recorded.get(path) or set().union(
            *(branches[other] for other in branches if len(other) == len(path))
        )
        if path in recorded:
            expected &= original  # others have other names now, in all heads
        else:
            parts = {part for name in branches[path] if (part := _parent(name)) and not _is_inner(part, modules)}
            expected |= {key for key in original if _parent(key) in parts and not key.rpartition(".")[2].isdecimal()}
        missing += [f"{peers}.{branch_name(path)}.{name}" for name in sorted(expected - branches[path])]
    if missing:
        raise MixedError(
            f"The checkpoint lacks {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}.",
            why="a head without it would get that of another head",
            hint="was it saved whole? If these never had peers: train_model.load_state_dict, and fxcollab.prune",
        )
    values = {name: (_kind(state[key]), _kind(state[name])) for name, key in names.items() if key != name}
    wrong = [f"{name} is {new} and was {old}" for name, (new, old) in values.items() if new != old]
    if wrong:
        raise MixedError(
            "The head's tensors are not like those of head 0.",
            where="; ".join(wrong[:4]),
            why="every branch is an instance of the same modules",
            hint="was the checkpoint put together from several?",
        )


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_inner(module: str, modules: Sequence[str]) -> bool:
    """Whether some of the sorted ``modules``, each with a dot behind its name, lie in a module."""
    first = bisect_right(modules, f"{module}.")
    return first < len(modules) and modules[first].startswith(f"{module}.")


def prune_names(keys: Iterable[str], head: int, *, peers: str = "peers") -> dict[str, str]:
    """For each original name, in order, the key that it has in a training model's state for ``head``."""
    branches: dict[Path, dict[str, str]] = {}
    original: dict[str, str] = {}
    for key in keys:
        path, name = branch_and_name(key, peers)
        (branches.setdefault(path, {}) if path else original)[name] = key
    if not branches:
        raise StateError(
            "The checkpoint holds no peers.",
            where=f"its keys are {', '.join(list(original)[:4])}, ...",
            why=f"no key begins with '{peers}.', so it is not the state dict of a training model",
            hint="it may be the state of a single network already; or name the peers: peers='...'",
        )
    if strange := [name for name in original if name.startswith(f"{peers}.")]:
        raise StateError(
            "The checkpoint holds peers of no branch.",
            where=strange[0][:200],
            why=f"after '{peers}.' comes the name of a branch, such as b1 or b0_1",
            hint=f"is {peers!r} the name of a module of the network? Name the peers: peers='...'",
        )
    path = tree_of(branches).head_path(head)
    for level in range(1, len(path) + 1):
        original.update(branches.get(path[:level], {}))
    return original


def refuse_other_checkpoint(checkpoint: Iterable[str], own: Iterable[str], peers: str) -> None:
    """Raise where keys are those of a wrapper, of a single network, or of a training model with another head tree.

    Raises:
        StateError: with the call that loads it.
    """
    if prefix := _prefix_of_peers(checkpoint := list(checkpoint), peers):
        raise StateError(
            "The checkpoint is that of a module around the training model.",
            why=f"its keys begin with {prefix!r}",
            hint=f"take that away: {{key.removeprefix({prefix!r}): value for key, value in checkpoint.items()}}",
        )
    names, own_names = (_names_of_branches(keys, peers) for keys in (checkpoint, own))
    found, expected = (tree_of(paths) if (paths := of.keys() - {()}) else None for of in (names, own_names))
    if found is None:
        raise StateError(
            "The checkpoint is that of a single network, without other heads.",
            why=f"no key begins with '{peers}.'",
            hint="fxcollab.original(train_model).load_state_dict(checkpoint) loads it into the trunk and head 0; for "
            "all heads load it into the model before fxcollab.transform(model, init='finetune')",
        )
    if expected is not None and found != expected:
        raise StateError(
            f"The checkpoint is that of a training model with {found.heads} heads, this one has {expected.heads}.",
            why=f"its fan-outs are {found.fanouts}, not {expected.fanouts}",
            hint="load_state_dict(checkpoint, strict=False) loads the branches that both have, and returns the names "
            "of what stays as init made it; or take one head: fxcollab.original(train_model).load_state_dict("
            "fxcollab.prune_state_dict(checkpoint, head=0))",
        )
    if names[()] == own_names[()]:
        for path, here in own_names.items():
            _refuse_other_splits(set(map(_parent, names[path])), set(map(_parent, here)), path, peers)


def _refuse_other_splits(modules: set[str], own: set[str], path: Path, peers: str) -> None:
    """Raise where a branch of a checkpoint has the state of other modules."""
    lacks, has = (", ".join(sorted(names)[:4]) for names in (own - modules, modules - own))
    if lacks or has:
        raise StateError(
            "The checkpoint has other modules in its branches than this training model.",
            where=f"{peers}.{branch_name(path)}",
            why=" and ".join([f"it lacks {lacks}"] * bool(lacks) + [f"it has {has} as well"] * bool(has)),
            hint="was it made with other splits? Transform with these (or was it not saved whole?); "
            "load_state_dict(checkpoint, strict=False) loads what both have",
        )


def _names_of_branches(keys: Iterable[str], peers: str) -> dict[Path, set[str]]:
    """The original names of each branch's state, of the trunk and head 0 under the empty path."""
    found: dict[Path, set[str]] = {(): set()}
    for path, name in (branch_and_name(key, peers) for key in keys):
        found.setdefault(path, set()).add(name)
    return found


def unwrapped(checkpoint: Mapping[str, Any], peers: str = "peers") -> dict[str, Any]:
    """The state dict without the prefixes that wrappers put before or into its keys."""
    nested = [
        str(key)
        for key, value in checkpoint.items()
        if isinstance(value, Mapping) and not str(key).endswith(_EXTRA_STATE)
    ]
    if nested or not all(isinstance(key, str) for key in checkpoint):
        raise StateError(
            "The checkpoint is not a state dict.",
            why=f"its values under {', '.join(nested) or 'keys that are not strings'} are not tensors",
            hint=f"pass the state dict inside it, such as checkpoint[{nested[0]!r}]" if nested else None,
        )
    names = {key: without_infixes(key) for key in checkpoint}
    state = {name: checkpoint[key] for key, name in names.items()}
    if len(state) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        raise StateError(
            "The checkpoint has two tensors for one name.",
            where=", ".join(key for key, name in names.items() if name == twice),
            why="without what wrappers put into names they are the same",
            hint="pass the state of one wrapped model",
        )
    prefix = _prefix_of_peers(state, peers)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _prefix_of_peers(state: Iterable[str], peers: str) -> str:
    """What wrappers put before the keys: a module around the model may hold other state beside it."""
    of_peers = re.compile(rf"((?:.*?\.)??){re.escape(peers)}\.b\d+(?:_\d+)*\.")
    keys = set(state)
    found = sorted({match.group(1) for key in keys if (match := of_peers.match(key))}, key=len)
    first = {key.removeprefix(found[0]) for key in keys if key.startswith(found[0])} if found else set()

    def is_another(prefix: str) -> bool:
        """Whether it is no part of the first model, or a whole model, such as an average, beside it."""
        if not prefix.startswith(found[0]):
            return True
        return all(f"{prefix}{key}" in keys for key in first if not f"{found[0]}{key}".startswith(prefix))

    if other := next((prefix for prefix in found[1:] if is_another(prefix)), None):
        raise StateError(
            "The checkpoint holds several training models.",
            where=f"under {found[0]!r} and {other!r}",
            why="it is not said which of them is meant",
            hint=f"pass the entries of one: {{key: value for key, value in checkpoint.items() "
            f"if key.startswith({found[0]!r})}}",
        )
    return found[0] if found else ""


def tree_of(branches: Collection[Path]) -> HeadTree:
    """The head tree whose branches these are, without the names of its splits."""
    depth = max(map(len, branches))
    heads = sorted({(0,) * depth, *(path for path in branches if len(path) == depth)})
    try:
        tree = HeadTree.from_heads((), heads)
    except PatternError as error:
        raise StateError("The checkpoint lacks branches.", why=error.what, hint="was it saved whole?") from error
    missing = [branch_name(path) for path in tree.peers() if path not in branches]
    if missing:
        raise StateError(
            f"The checkpoint lacks the peers of {', '.join(missing[:4])}.",
            why="every branch of a training model has peers",
            hint="was it saved whole?",
        )
    return tree


def without_infixes(key: str) -> str:
    """A key without what wrappers of inner modules put into it."""
    for infix in _INFIXES:
        key = key.replace(infix, "")
    return key
