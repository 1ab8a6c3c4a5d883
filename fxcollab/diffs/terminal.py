"""The difference for a terminal: the head tree, and what each branch holds, unchanged runs folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from fxcollab.diffs.model import MEANINGS, Change, DiffData, DiffNode
from fxcollab.tree import Path, branch_name

STYLES: Mapping[Change, str] = {
    "shared": "", "own": "", "cloned": "green", "rescaled": "yellow", "copied": "magenta", "state": "cyan"
}  # fmt: skip
SHOWN = 3
"""Names of a folded run that are shown, before the last one."""


def view(diff: DiffData, *, unfolded: bool = False) -> RenderableType:
    """Text for a console of any width, with or without colours: the meaning is in glyphs, too.

    Args:
        diff: the difference.
        unfolded: one line a node.
    """
    title = Text(f"{diff.pattern}, {diff.tree.heads} heads, {'train' if diff.training else 'eval'} mode", "bold")
    root = Tree(Group(Text("trunk", "bold"), *_entries(diff, (), unfolded)), guide_style="dim")
    _grow(root, diff, (), unfolded)
    return Group(title, root, *_legend(diff), _counts(diff))


def _legend(diff: DiffData) -> Iterator[Text]:
    """The meaning of the glyphs."""
    yield Text("= original  + another head's instance  ~ gradient scaled  ! copy before a write", "dim")
    if diff.count("state"):
        yield Text(". a parameter of a shallower level, passed in", "dim")


def _counts(diff: DiffData) -> Text:
    """The last line, which counts nodes."""
    found = Text()
    for change in ("cloned", "rescaled", "copied", "state"):
        number, name = diff.count(change), "passed in" if change == "state" else change
        if number or change in ("cloned", "rescaled"):
            found.append(f"{MEANINGS[change][0]} {number} {name}", STYLES[change]).append("  ")
    found.append(f"> {sum(node.rewired for node in diff.nodes)} rewired  ")
    return found.append(f"= {diff.count('shared', 'own')} of the original", "dim")


def _grow(tree: Tree, diff: DiffData, path: Path, unfolded: bool) -> None:
    if len(path) == diff.tree.depth:
        return
    for child in diff.tree.paths(len(path) + 1):
        if child[:-1] == path:
            heading = Text(branch_name(child), "bold").append(f"  {diff.heads(child)}", "not bold dim")
            entries = _entries(diff, child, unfolded)
            _grow(tree.add(Group(heading, *entries)), diff, child, unfolded)


def _entries(diff: DiffData, path: Path, unfolded: bool) -> Iterator[Text]:
    for change, run in groupby(diff.of_branch(path), lambda node: node.change):
        nodes = list(run)
        if change in ("rescaled", "copied", "state"):
            yield from map(_inserted, nodes)
        elif unfolded:
            yield from map(_line, nodes)
        else:
            yield _folded(change, nodes)


def _folded(change: Change, nodes: Sequence[DiffNode]) -> Text:
    """``= conv1, bn1, relu ... 37 more ... layer2   1.4M parameters``."""
    names = [node.counterpart or node.name for node in nodes]
    hidden = len(names) - SHOWN - 1
    shown = f"{', '.join(names[:SHOWN])} ... {hidden} more ... {names[-1]}" if hidden > 1 else ", ".join(names)
    parameters = sum(node.new_parameters for node in nodes)
    text = Text(f"{nodes[0].glyph} {shown}", STYLES[change])
    return text.append(f"  {parameters:,} parameters", "dim") if parameters else text


def _inserted(node: DiffNode) -> Text:
    what = f"the gradient of {node.origin} times {node.factor:g}" if node.factor else f"{node.kind} of {node.origin}"
    return Text(f"{node.glyph} {node.name}: {what}", STYLES[node.change])


def _line(node: DiffNode) -> Text:
    text = Text(f"{node.glyph} {node.name}", STYLES[node.change])
    facts = [node.label if node.label != node.name else "", "x".join(map(str, node.shape or ()))]
    facts.append(f"{node.parameters:,} parameters" if node.parameters else "")
    return text.append("  " + "  ".join(filter(None, facts)), "dim")
