"""One model of the difference between a training graph and its inference graph; everything else is a view of it.

The inference graph is the training graph without what was added, so nothing is matched: every node says by its
provenance what became of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Literal, TypeAlias

from rich.console import Console, RenderableType

from fxcollab.provenance import Kind
from fxcollab.tree import HeadTree, Path, branch_name

if TYPE_CHECKING:
    from fxcollab.proof.report import Report

Change: TypeAlias = Literal["shared", "own", "cloned", "rescaled", "copied", "state"]
"""What became of a node. ``shared``: of the trunk, once for all heads. ``own``: head 0's instance of what lies behind
a split. ``cloned``: another head's. ``rescaled``, ``copied``, ``state``: inserted. Inference has the first two."""

GLYPHS: Mapping[Change, str] = {
    "shared": "=", "own": "=", "cloned": "+", "rescaled": "~", "copied": "!", "state": "."
}  # fmt: skip


@dataclass(frozen=True)
class DiffNode:
    """A node of the training graph.

    Attributes:
        name: in the training graph.
        kind: what the rewrite did, as in `Provenance`.
        counterpart: the inference graph's node that it is an instance of; None where it was inserted.
        origin: the captured node that it stems from, inserted nodes too.
        path: of the branch that it belongs to; empty for the trunk.
        op: as in ``torch.fx``: ``call_module`` and so on.
        label: what it does, in a word: the module's class, the function's name.
        target: the module's path, the function, of the original.
        module: the path of the opened module in whose forward it stands; "" for the root's.
        inputs: the names of the nodes that it reads.
        factor: what a rescale multiplies gradients with; None elsewhere.
        shape, dtype: of its value; None where that is no single tensor, or nothing is known.
        parameters: values in the parameters of this instance.
        new_parameters: those of them that no node before it has: their sum counts every parameter once.
        flops: of a forward; None where nothing is known.
        source: the line of the user's code that made it, where that was recorded.
    """

    name: str
    kind: Kind
    counterpart: str | None
    origin: str
    path: Path
    op: str
    label: str
    target: str
    module: str
    inputs: tuple[str, ...]
    factor: float | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    parameters: int = 0
    new_parameters: int = 0
    flops: int | None = None
    source: str | None = None

    @property
    def change(self) -> Change:
        """What became of it."""
        if self.kind == "clone":
            return "cloned" if any(self.path) else "own"
        inserted: Mapping[Kind, Change] = {"rescale": "rescaled", "copy": "copied", "state": "state"}
        return inserted.get(self.kind, "shared")

    @property
    def glyph(self) -> str:
        """One character for it."""
        return GLYPHS[self.change]

    @property
    def branch(self) -> str:
        """The name of its branch; "" for the trunk."""
        return branch_name(self.path) if self.path else ""

    @property
    def in_inference(self) -> bool:
        """Whether the inference graph of head 0 has it."""
        return self.change in ("shared", "own")


@dataclass(frozen=True)
class Diff:
    """A training graph beside its inference graph.

    Attributes:
        pattern: the pattern's name.
        tree: splits and fan-outs.
        training: whether this is train mode's graph.
        nodes: of the training graph, in its order.
        inputs: on which shapes and FLOPs were counted, as text; None where they are unknown.
        unknown: why shapes are unknown; None where they are known.
        limitations: limitations.
    """

    pattern: str
    tree: HeadTree
    training: bool
    nodes: tuple[DiffNode, ...]
    inputs: str | None = None
    unknown: str | None = None
    limitations: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, DiffNode]:
        """Nodes by their names."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def instances(self) -> Mapping[str, tuple[DiffNode, ...]]:
        """For each node of the inference graph its instances, head 0's or the trunk's first."""
        found: dict[str, list[DiffNode]] = {}
        for node in self.nodes:
            if node.counterpart is not None:
                found.setdefault(node.counterpart, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def of_branch(self, path: Path) -> tuple[DiffNode, ...]:
        """The nodes of one branch, in order."""
        return tuple(node for node in self.nodes if node.path == path and node.op != "output")

    def to_json(self) -> str:
        """All of it as versioned JSON, the same bytes for the same graphs."""
        from fxcollab.diffs.data import to_data  # the views know the model, not the other way round

        return json.dumps(to_data(self), indent=1)

    def to_html(self, path: str | os.PathLike[str], report: Report | None = None) -> None:
        """Write one self-contained page, which works offline; ``report`` of `verify` becomes a badge."""
        from fxcollab.diffs.html import to_html

        FilePath(path).write_text(to_html(self, report), encoding="utf-8")

    def to_svg(self, path: str | os.PathLike[str]) -> None:
        """Write a static picture; neither a browser nor ``dot`` is needed."""
        from fxcollab.diffs.svg import to_svg

        FilePath(path).write_text(to_svg(self), encoding="utf-8")

    def to_png(self, path: str | os.PathLike[str], *, dark: bool = False, scale: float = 2.0) -> None:
        """Write the static picture in pixels, ``scale`` of them for each of the SVG's units."""
        from fxcollab.diffs.png import to_png

        FilePath(path).write_bytes(to_png(self, dark=dark, scale=scale))

    def save(self, path: str | os.PathLike[str], report: Report | None = None) -> None:
        """Write the view that the file's ending names: .html, .svg, .png, .json, .dot or .mmd (Mermaid).

        Args:
            path: the file.
            report: what `verify` found, to be shown on a page.

        Raises:
            DiffError: another ending.
        """
        from fxcollab.diffs.formats import write

        write(self, FilePath(path), report)

    def _ipython_display_(self) -> None:
        """In a notebook: the picture, and the page below it, which is left out where scripts are not shown."""
        from fxcollab.diffs.notebook import show

        show(self)

    def to_dot(self) -> str:
        """The training graph in Graphviz's DOT: a cluster a branch."""
        from fxcollab.diffs.dot import to_dot

        return to_dot(self)

    def to_mermaid(self) -> str:
        """The training graph as a Mermaid flowchart."""
        from fxcollab.diffs.dot import to_mermaid

        return to_mermaid(self)

    def __rich__(self) -> RenderableType:
        """The view for a terminal; `str` is the same in 80 columns, without colours."""
        from fxcollab.diffs.terminal import view

        return view(self)

    def __str__(self) -> str:
        console = Console(width=80, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def count(self, *changes: Change) -> int:
        """How many nodes changed in one of these ways; the output is none of them."""
        return sum(node.change in changes for node in self.nodes if node.op != "output")
