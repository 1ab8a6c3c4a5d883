"""Patterns: constructors of head trees, by name.

A pattern is a function of ``splits``, and of ``heads`` or ``fanouts`` if it takes them, that returns a `HeadTree`:

    @fxcollab.register_pattern("forks")
    def forks(splits, heads=2):
        return fxcollab.HeadTree(tuple(splits), (heads,) * len(splits))

Packages offer patterns as entry points of the group ``fxcollab.patterns``; ``module:name`` names a function that
nobody registered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import entry_points
from itertools import islice
from typing import Any, Final, Literal, TypeAlias, TypeVar

from fxcollab.arguments import checked
from fxcollab.errors import FxCollabError, PatternError, closest, one_line
from fxcollab.sources.code import imported
from fxcollab.tree import Fanout, HeadTree, hierarchical, ladder, multi_instance

AUTO: Final = "auto"
"""Instead of split names: choose them automatically."""
GROUP = "fxcollab.patterns"
"""The group of entry points that are patterns."""
_MOST_SPLITS, _SHOWN = 12, 4
Fanouts: TypeAlias = Sequence[Fanout] | Literal["auto"]
"""Fan-outs, one for each split; or ``auto``, where splits and fan-outs are to be chosen."""

Constructor = TypeVar("Constructor", bound=Callable[..., HeadTree])


def _simple(splits: Sequence[str], heads: int = 2) -> HeadTree:
    """One split, one branch a head (figure 1 c)."""
    if len(splits) > 1:
        raise PatternError(
            f"Pattern 'simple' takes one split, but {', '.join(splits)} is given.",
            hint="use pattern 'hierarchical' for several, or 'a+b' for one split at two values",
        )
    return HeadTree(tuple(splits), multi_instance(heads).fanouts)


_BUILT_IN: dict[str, Callable[..., HeadTree]] = {
    "multi-instance": multi_instance, "simple": _simple, "hierarchical": hierarchical, "ladder": ladder,
}  # fmt: skip
PATTERNS = tuple(_BUILT_IN)
_registered: dict[str, Callable[..., HeadTree]] = {}


@checked
def register_pattern(name: str) -> Callable[[Constructor], Constructor]:
    """A decorator that makes a constructor of head trees known as pattern ``name``.

    The constructor has parameters ``splits``, ``heads`` and ``fanouts``, or some of them: those that it doesn't have
    can't be given with the pattern. What it returns is checked like any tree.

    Raises:
        PatternError: the name is that of a built-in pattern.
    """
    if name in _BUILT_IN:
        raise PatternError(f"Pattern {name!r} is built in.", hint="give yours another name")

    def register(constructor: Constructor) -> Constructor:
        _registered[name] = constructor
        return constructor

    return register


def pattern_of(tree: HeadTree) -> str:
    """The built-in pattern that makes such a tree from its splits, or from splits and fan-outs."""
    if not tree.splits:
        return "multi-instance"
    if tree.depth == 1:
        return "simple"
    return "ladder" if tree == ladder(tree.splits) else "hierarchical"


def arguments_for(pattern: str, tree: HeadTree) -> dict[str, Any]:
    """The arguments of `head_tree` by which a built-in pattern makes a tree: of heads and fan-outs what it takes."""
    takes = inspect.signature(_BUILT_IN[pattern]).parameters
    given = {"splits": tree.splits, "heads": tree.heads, "fanouts": tree.fanouts}
    return {name: value for name, value in given.items() if name in takes}


def is_made_by(pattern: str, tree: HeadTree) -> bool:
    """Whether a built-in pattern can make such a tree; of any other pattern this is not known, and it may."""
    if pattern not in _BUILT_IN:
        return True
    try:
        return head_tree(pattern, **arguments_for(pattern, tree)) == tree
    except PatternError:
        return False


def head_tree(
    pattern: str,
    splits: Sequence[str] = (),
    heads: int | None = None,
    fanouts: Fanouts | None = None,
) -> HeadTree:
    """The tree of a named pattern.

    Raises:
        PatternError: the arguments don't fit the pattern.
    """
    if fanouts == AUTO:
        raise PatternError("Fan-outs are chosen with the splits.", hint="name them, or give splits='auto' as well")
    repeated = sorted({split for split in splits if list(splits).count(split) > 1})
    if repeated:
        raise PatternError(f"Split {', '.join(repeated)} is named twice.", hint="name every split once")
    constructor = _constructor(pattern)
    takes = inspect.signature(constructor).parameters
    if "splits" not in takes and splits:
        raise PatternError(
            f"Pattern {pattern!r} takes no splits, but {', '.join(splits)} is given.",
            why="its heads share nothing but the inputs",
            hint="use pattern 'simple' or 'hierarchical' to share what lies before a split",
        )
    if "splits" in takes and not splits:
        raise PatternError(
            f"Pattern {pattern!r} needs a split.",
            hint="name the module after which the heads begin, for example splits=['layer2'] (--splits layer2); "
            "find_splits(model) (fxcollab splits) lists those of a model",
        )
    if "fanouts" not in takes and fanouts is not None:
        other = "give heads=... (--heads), or " if "heads" in takes else ""
        raise PatternError(f"Pattern {pattern!r} takes no fan-outs.", hint=f"{other}use pattern 'hierarchical'")
    given = {"splits": tuple(splits) or None, "heads": heads, "fanouts": fanouts}
    given = {name: value for name, value in given.items() if value is not None and name in takes}
    try:
        tree = constructor(**given)
    except FxCollabError:
        raise
    except Exception as error:  # a function of the user's
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise PatternError(
            f"Pattern {pattern!r} failed.",
            where=getattr(constructor, "__qualname__", None),
            why=one_line(error),
            hint=f"let it return a fxcollab.HeadTree where it is called with {arguments or 'no arguments'}",
        ) from error
    return _checked(tree, pattern, heads)


def _checked(tree: Any, pattern: str, heads: int | None) -> HeadTree:
    if not isinstance(tree, HeadTree):
        raise PatternError(
            f"Pattern {pattern!r} returns a value of type {type(tree).__name__}.",
            hint="let it return fxcollab.HeadTree(tuple(splits), fanouts), with one fan-out for each split",
        )
    if not tree.splits and tree.depth != 1:
        raise PatternError(
            f"Pattern {pattern!r} makes a tree of {tree.depth} levels without splits.",
            hint="let it return one split for each level: fxcollab.HeadTree(tuple(splits), fanouts)",
        )
    checked = hierarchical(tree.splits, tree.fanouts) if tree.splits else multi_instance(tree.heads)
    if heads is not None and heads != checked.heads:
        fanouts = ", ".join(map(str, checked.fanouts))
        raise PatternError(
            f"{len(checked.splits)} splits with fan-outs {fanouts} make {checked.heads} heads, not {heads}.",
            hint=f"leave heads out, or give splits and fan-outs that make {heads} heads",
        )
    return checked


def _constructor(pattern: str) -> Callable[..., HeadTree]:
    """The constructor behind a name."""
    known = {**_registered, **_BUILT_IN}
    if pattern in known:
        return known[pattern]
    module, _, name = pattern.partition(":")
    found: Any = imported(module, name) if name else _offered().get(pattern)
    if name and not callable(found):
        raise PatternError(f"{pattern} is not a function.", hint="name a constructor of head trees")
    if found is None:
        names = [*PATTERNS, *_registered, *_offered()]
        near = closest(pattern, names, 1)
        raise PatternError(
            f"There is no pattern {pattern!r}.",
            hint=f"{f'did you mean {near}? ' if near else ''}There are {', '.join(names)}; "
            "or name a function, as in package.module:NAME.",
        )
    constructor: Callable[..., HeadTree] = found if name else found.load()
    return constructor


def _offered() -> dict[str, Any]:
    """The entry points of installed packages."""
    return {point.name: point for point in entry_points(group=GROUP)}


def split_names(splits: Sequence[str] | str) -> tuple[str, ...]:
    """Splits as names; a text lists them with commas."""
    names = [name.strip() for name in splits.split(",")] if isinstance(splits, str) else list(splits)
    return tuple(name for name in names if name)


def fanouts_to_choose(
    pattern: str, heads: int | None = None, fanouts: Fanouts | None = None
) -> tuple[Fanout, ...] | Literal["auto"]:
    """The fan-outs of a head tree whose splits are still to be chosen; two splits by default.

    Raises:
        PatternError: the arguments don't fit the pattern, or it has no splits to choose.
    """
    if fanouts == AUTO:
        if pattern != "hierarchical" or heads is not None:
            raise PatternError(
                "Fan-outs can't be chosen for a given number of heads, nor for another pattern than 'hierarchical'.",
                hint="leave heads and pattern out, or name the fan-outs",
            )
        return AUTO
    counts: Iterable[int] = (2, 1)
    if isinstance(fanouts, Sequence):
        counts = (max(len(fanouts), 1),)
    elif heads is not None:
        counts = range(1, _MOST_SPLITS + 1)
    errors: list[PatternError] = []
    for count in counts:
        names = [AUTO, *(f"{AUTO} {level}" for level in range(2, count + 1))][:count]
        try:
            return head_tree(pattern, names, heads, fanouts).fanouts
        except PatternError as error:
            errors.append(error)
    if len({error.what for error in errors}) == 1 or heads is None:
        raise errors[0]
    raise PatternError(
        f"Pattern {pattern!r} makes no tree of {heads} heads, with any number of splits.",
        why=" ".join(islice(dict.fromkeys(error.what.replace(AUTO, "a choice") for error in errors), _SHOWN)),
        hint="give another number of heads, or none",
    )
