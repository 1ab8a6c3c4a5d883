"""The boxes of a drawing: branches of the head tree, and inside of them the modules that were opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fxcollab.diff.model import Diff, DiffNode
from fxcollab.tree import Path, branch_name

READABLE = 45
"""How many nodes and closed boxes a person takes in at a glance."""


@dataclass(eq=False)
class Box:
    """A branch or an opened module, with what stands in it.

    Attributes:
        title: what stands above it.
        path: of the branch it belongs to.
        module: the module's path; None for a branch.
        parent: the box around it; None for the outermost.
        children: boxes and nodes, in the graph's order.
        open: whether its inside is drawn.
    """

    title: str
    path: Path
    module: str | None
    parent: Box | None
    children: list[Box | DiffNode] = field(default_factory=list)
    open: bool = False

    def nodes(self) -> Iterator[DiffNode]:
        """All nodes inside."""
        for child in self.children:
            yield from child.nodes() if isinstance(child, Box) else (child,)

    def boxes(self) -> Iterator[Box]:
        """The boxes right inside."""
        return (child for child in self.children if isinstance(child, Box))


def boxes_of(diff: Diff, readable: int = READABLE) -> Box:
    """The outermost box; opened from outside in, all boxes of a depth or none, while that stays readable."""
    root = Box("", (), None, None, open=True)
    known: dict[tuple[Path, str | None], Box] = {((), None): root}

    def inside(path: Path, module: str | None, title: str, parent: Box) -> Box:
        if (path, module) not in known:
            known[path, module] = Box(title, path, module, parent, open=module is None)
            parent.children.append(known[path, module])
        return known[path, module]

    for node in diff.nodes:
        box = root
        for level in range(1, len(node.path) + 1):
            path = node.path[:level]
            box = inside(path, None, _heading(diff, path), box)
        atoms = node.module.split(".") if node.module else []
        for depth in range(1, len(atoms) + 1):
            box = inside(node.path, ".".join(atoms[:depth]), atoms[depth - 1], box)
        box.children.append(node)
    _merge_chains(root)
    _open_up_to(root, readable)
    return root


def _heading(diff: Diff, path: Path) -> str:
    heads = diff.tree.heads_of(path)
    name = branch_name(path)
    return f"{name}: head {heads[0]}" if len(heads) == 1 else f"{name}: heads {heads[0]} to {heads[-1]}"


def _merge_chains(box: Box) -> None:
    """A module's box that holds nothing but one more is left out."""
    for place, child in enumerate(box.children):
        while isinstance(child, Box) and child.module is not None and len(child.children) == 1:
            inner = child.children[0]
            if not isinstance(inner, Box):
                break
            inner.parent, inner.title = box, f"{child.title}.{inner.title}"
            box.children[place] = child = inner
        if isinstance(child, Box):
            _merge_chains(child)


def _open_up_to(root: Box, readable: int) -> None:
    depth = [root]
    while depth:
        inside = [box for outer in depth for box in outer.boxes()]
        closed = [box for box in inside if not box.open]
        if closed and _shown(root) + sum(len(box.children) - 1 for box in closed) > readable:
            return
        for box in closed:
            box.open = True
        depth = inside


def _shown(box: Box) -> int:
    return sum(_shown(child) if isinstance(child, Box) and child.open else 1 for child in box.children)
