"""Summaries and reports for people."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from .console import out

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from fxcollab.costs.costs import Costs
    from fxcollab.costs.summary import Summary
    from fxcollab.costs.text import Entry
    from fxcollab.proof.report import Report
    from fxcollab.splits.candidates import Candidate
    from fxcollab.splits.choice import Choice

_INDENT = 12
_STYLES = {"+": "green", "~": "yellow", "!": "magenta", "=": "dim"}


def render_summary(summary: Summary, choice: Choice | None) -> None:
    """How splits were chosen, heads, levels, what was cloned and rescaled, parameters and FLOPs to the original's."""
    if choice:
        render_choice(choice)
    out().print(summary.title)
    _print_entries(summary.entries())
    out().print(Text("  ").join(Text(count, _STYLES[count[0]]) for count in summary.counts()))


def levels_of(graph_module: GraphModule) -> str:
    """Which nodes of a graph that was cut lie on each level, a line a level."""
    from fxcollab.analysis.partition import LEVEL_KEY

    levels: dict[int, list[str]] = {}
    for node in graph_module.graph.nodes:
        levels.setdefault(node.meta[LEVEL_KEY], []).append(node.name)
    return "".join(f"level {level}: {', '.join(names)}\n" for level, names in sorted(levels.items()))


def render_report(report: Report) -> None:
    """One entry a check."""
    for check in report:
        mark = Text("ok", "green") if check.ok else Text("FAILED", "bold red")
        mark = mark if check.checked else Text("-", "dim")
        _print_entry(mark, Text(f"{check.name}: ").append(check.detail, "dim"))
    for limitation in report.limitations:
        _print_entry(Text("limitation", "yellow"), Text(limitation))
    out().print(_verdict(report))


def _verdict(report: Report) -> Text:
    total, unmade = len(report.checks), len(report.not_checked)
    if failed := sum(not check.ok for check in report):
        return Text(f"{failed} of {total} checks failed", "bold red")
    if unmade:
        return Text(f"{total - unmade} checks hold, {unmade} could not be made", "bold green")
    return Text(f"all {total} checks hold", "bold green")


def render_choice(choice: Choice) -> None:
    """What was chosen and why, and what else there was."""
    chosen = f"{', '.join(choice.splits)}: {choice.option.time:.2f}x the time; {choice.reason}"
    _print_entry(Text("splits"), Text(chosen))
    for other in choice.runners_up:
        names, time = ", ".join(other.option.splits), f"{other.option.time:.2f}x the time"
        _print_entry(Text("  not"), Text(f"{names}: {time}, {other.why}", "dim"))


def render_costs(costs: Costs, choice: Choice | None, *, guessed: bool = False) -> None:
    """A training step of the original and of the training graph, side by side; ``guessed`` if no input was given."""
    if choice:
        render_choice(choice)
    if guessed:
        _print_entry(Text("input"), Text("guessed: set --input"))
    _print_entries(costs.entries())


def _crossing(candidate: Candidate) -> str:
    count, size = candidate.crossing
    return f"{count} values, {size / 1e6:.1f} MB"


def render_candidates(found: Sequence[Candidate], *, guessed: bool = False) -> None:
    """A table: one row a candidate, those at which a stage ends in bold and marked; ``guessed`` as for costs."""
    if not found:
        out().print(
            "no value with a name cuts the model: look deeper with --depth, or at all operations (--granularity op)"
        )
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("split", no_wrap=True, min_width=max(len(candidate.name) for candidate in found))
    table.add_column("shape", justify="right", no_wrap=True)
    for name in ("FLOPs before", "memory before", "parameters behind", "in stage"):
        table.add_column(name, justify="right")
    for candidate in found:
        memory = candidate.activations[0] / max(sum(candidate.activations), 1)
        table.add_row(
            Text(candidate.name, "" if candidate.is_module else "italic"),
            "x".join(map(str, candidate.shape or ())) if candidate.is_narrow else _crossing(candidate),
            f"{candidate.share:.1%}",
            f"{memory:.1%}",
            f"{candidate.parameters[1]:,}",
            f"{candidate.run[0]}/{candidate.run[1]}{' *' if candidate.ends_stage else '  '}",
            style="bold" if candidate.ends_stage else "",
        )
    out().print(table, soft_wrap=False)
    told = "in stage: which of how many in a row that have this resolution"
    if any(candidate.ends_stage for candidate in found):
        told += "; * ends a stage, the resolution changes behind it"
    out().print(Text(told + ("; input guessed: set --input" if guessed else ""), "dim"))


def _print_entries(entries: Iterable[Entry]) -> None:
    for label, text, remark in entries:
        style = "yellow" if label == "limitation" else ""
        _print_entry(Text(label, style), Text(text).append(remark, "dim"))


def _print_entry(label: Text, text: Text) -> None:
    """A label, and text that wraps beside it; one line an entry in a pipe, for grep."""
    console = out()
    wraps = console.is_terminal or "COLUMNS" in os.environ
    for line in text.wrap(console, console.width - _INDENT, overflow="fold") if wraps else [text]:
        line.rstrip()
        label.pad_right(_INDENT - len(label))
        out().print(label + line)
        label = Text()
