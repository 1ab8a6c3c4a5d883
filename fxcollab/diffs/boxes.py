"""The boxes of a drawing: branches of the head tree, opened modules inside of them, runs of what is unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, TypeAlias

from fxcollab.diffs.model import DiffData, DiffNode
from fxcollab.tree import Path, branch_name

READABLE = 45
"""How many nodes and closed boxes are drawn before modules stay closed."""
RUN = 3
"""The fewest unchanged nodes that are folded."""


Status: TypeAlias = Literal["unchanged", "cloned"] | None


@dataclass(frozen=True)
class Run:
    """Neighbours in a box with one status, from the child at ``start`` to the one before ``stop``."""

    start: int
    stop: int
    title: str
    status: Status


@dataclass(eq=False)
class Box:
    """A branch, an opened module or a folded run, with what stands in it.

    Attributes:
        kind: ``root`` for the outermost.
        title: what stands above it.
        path: of the branch it belongs to.
        module: the path of the module in whose forward its nodes stand; "" for the root's.
        children: boxes and nodes, in the graph's order.
        open: whether its inside is drawn.
        status: of the nodes of a run.
    """

    kind: Literal["root", "branch", "module", "run"]
    title: str
    path: Path = ()
    module: str = ""
    children: list[Item] = field(default_factory=list)
    open: bool = False
    status: Status = None

    @property
    def id(self) -> str:
        """A unique name."""
        branch = branch_name(self.path) if self.path else ""
        return f"{branch}|{self.module}" if self.kind == "module" else branch

    def nodes(self) -> Iterator[DiffNode]:
        """All nodes inside."""
        for child in self.children:
            yield from child.nodes() if isinstance(child, Box) else (child,)

    def boxes(self) -> Iterator[Box]:
        """The boxes right inside."""
        return (child for child in self.children if isinstance(child, Box))

    def runs(self) -> Iterator[Run]:
        """Runs to fold: not inputs, outputs and inserted nodes, nor the whole of a module's box.

        Clones are folded only where there are too many to be read.
        """
        for what, places in groupby(range(len(self.children)), lambda place: _status(self.children[place])):
            run = list(places)
            items = [self.children[place] for place in run]
            wanted = what == "unchanged" or (what == "cloned" and len(self.children) > READABLE)
            whole = self.kind == "module" and len(items) == len(self.children)
            if wanted and not whole and len(items) > 1 and _count(items) >= RUN:
                title = f"{name_of(items[0])} \N{HORIZONTAL ELLIPSIS} {name_of(items[-1])}"
                yield Run(run[0], run[-1] + 1, title, what)

    def to_data(self) -> dict[str, Any]:
        """Plain data: boxes inside of boxes, nodes by name."""
        return {
            "id": self.id,
            "kind": self.kind,
            "title": self.title,
            "branch": branch_name(self.path) if self.path else "",
            "open": self.open,
            "children": [child.to_data() if isinstance(child, Box) else child.name for child in self.children],
            "runs": [[run.start, run.stop, run.title, run.status] for run in self.runs()],
        }


Item: TypeAlias = Box | DiffNode


def boxes_of(diff: DiffData, readable: int = READABLE) -> Box:
    """The outermost box; opened from outside in, all boxes of a depth or none, while that stays readable."""
    root = Box("root", "", open=True)
    known: dict[tuple[Path, str], Box] = {((), ""): root}

    def inside(path: Path, module: str, title: str, parent: Box) -> Box:
        if (path, module) not in known:
            kind: Literal["branch", "module"] = "module" if module else "branch"
            known[path, module] = Box(kind, title, path, module, open=not module)
            parent.children.append(known[path, module])
        return known[path, module]

    for node in diff.nodes:
        box = root
        for level in range(1, len(node.path) + 1):
            path = node.path[:level]
            box = inside(path, "", f"{branch_name(path)}: {diff.heads(path)}", box)
        inserted = node.counterpart is None  # stands in its branch, to be seen where modules are closed
        atoms = node.module.split(".") if node.module and not inserted else []
        for depth in range(1, len(atoms) + 1):
            box = inside(node.path, ".".join(atoms[:depth]), atoms[depth - 1], box)
        box.children.append(node)
    _merge_chains(root)
    open_up_to(root, readable)
    return root


def fold(box: Box) -> None:
    """Close every run of unchanged things, here and inside, into a box of its own."""
    for child in list(box.boxes()):
        fold(child)
    for run in reversed(list(box.runs())):
        members = box.children[run.start : run.stop]
        box.children[run.start : run.stop] = [Box("run", run.title, box.path, box.module, members, status=run.status)]


def open_up_to(root: Box, readable: int) -> None:
    """Open boxes from outside in, all of a depth or none, while that stays readable; runs stay closed."""
    depth = [root]
    while depth:
        inside = [box for outer in depth for box in outer.boxes() if box.kind != "run"]
        closed = [box for box in inside if not box.open]
        if closed and shown(root) + sum(len(box.children) - 1 for box in closed) > readable:
            return
        for box in closed:
            box.open = True
        depth = inside


def shown(box: Box) -> int:
    """How many nodes and closed boxes are drawn."""
    return sum(shown(child) if isinstance(child, Box) and child.open else 1 for child in box.children)


def name_of(item: Item) -> str:
    """A called module's path from the box in which it stands; other nodes have no shorter name."""
    if isinstance(item, Box):
        return item.title
    inside = item.op == "call_module" and item.module and item.target.startswith(f"{item.module}.")
    return item.target[len(item.module) + 1 :] if inside else item.counterpart or f"{item.change}: {item.origin}"


def _status(item: Item) -> Status:
    """The status of a node, or of all nodes in a module's box."""
    if isinstance(item, Box):
        statuses = {_status(child) for child in item.children} if item.kind == "module" else set[Status]()
        return statuses.pop() if len(statuses) == 1 else None
    if item.op in ("placeholder", "output"):
        return None
    return "unchanged" if item.in_inference else "cloned" if item.change == "cloned" else None


def _count(items: list[Item]) -> int:
    return sum(sum(1 for _ in item.nodes()) if isinstance(item, Box) else 1 for item in items)


def _merge_chains(box: Box) -> None:
    """A module's box that holds nothing but one more is left out."""
    for place, child in enumerate(box.children):
        while isinstance(child, Box) and child.kind == "module" and len(child.children) == 1:
            inner = child.children[0]
            if not isinstance(inner, Box):
                break
            inner.title = f"{child.title}.{inner.title}"
            box.children[place] = child = inner
        if isinstance(child, Box):
            _merge_chains(child)
