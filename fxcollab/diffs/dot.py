"""The difference in Graphviz's DOT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fxcollab.diffs.model import Change, DiffData, DiffNode
from fxcollab.io.mark import marked_text
from fxcollab.tree import Path, branch_name

_COLOURS: Mapping[Change, str] = {
    "shared": "#e8eaed", "own": "#ffffff", "cloned": "#ceead6", "rescaled": "#feefc3", "copied": "#fad2cf",
    "state": "#d2e3fc",
}  # fmt: skip


def to_dot(diff: DiffData) -> str:
    """Of the training graph: a cluster a branch, colours by change, factors on rescales."""
    return marked_text("\n".join(_dot(diff)), "//")


def _dot(diff: DiffData) -> Iterator[str]:
    yield "digraph fxcollab {"
    yield '  node [shape=box, style="rounded,filled", fontname="sans-serif"];'
    yield from _clusters(diff, (), "  ")
    for node in diff.nodes:
        for source in node.inputs:
            yield f"  {_quoted(source)} -> {_quoted(node.name)};"
    yield "}"


def _clusters(diff: DiffData, path: Path, indent: str) -> Iterator[str]:
    """A branch with its own nodes, and the branches inside of it."""
    if path:
        yield f"{indent}subgraph {_quoted(f'cluster_{branch_name(path)}')} {{"
        yield f"{indent}  label={_quoted(branch_name(path))};"
    for node in diff.nodes:
        if node.path == path:
            colour = _COLOURS[node.change]
            yield f"{indent}  {_quoted(node.name)} [label={_quoted(_label(node))}, fillcolor={_quoted(colour)}];"
    if len(path) < diff.tree.depth:
        for child in diff.tree.children(path):
            yield from _clusters(diff, child, indent + "  ")
    if path:
        yield f"{indent}}}"


def _label(node: DiffNode) -> str:
    if node.factor is not None:
        return f"{node.name}\ngradient x {node.factor:g}"
    return f"{node.name}\n{node.label}" if node.label != node.name else node.name


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
