"""Summaries and reports for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fxcollab.summary import Level, Summary
    from fxcollab.verify import Report

_SHOWN = 4


def render_summary(summary: Summary, console: Console) -> None:
    """Heads, levels, what was cloned and rescaled, parameters and FLOPs against the original."""
    console.print(f"{summary.heads} heads, {summary.pattern}, seed {summary.seed}, init {summary.init}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("level", "split", "branches", "modules and operations", "parameters"):
        table.add_column(column, justify="right" if column in ("branches", "parameters") else "left", no_wrap=True)
    for level in summary.levels:
        table.add_row(*_row(level))
    console.print(table)
    console.print(f"parameters  {_ratio(summary.parameters)}")
    if summary.flops and summary.inputs:
        console.print(f"FLOPs       {_ratio(summary.flops)}  forward, input {summary.inputs}")
    else:
        console.print("FLOPs       unknown: no input shape is given and none could be guessed (--input 1x3x224x224)")
    for sentence in summary.given_up:
        console.print(Text("given up: ", "yellow").append(sentence, "default"))
    counts = Text()
    counts.append(f"+ {summary.cloned} cloned", "green").append("  ")
    counts.append(f"~ {summary.rescaled} rescaled", "yellow").append("  ")
    if summary.copied:
        counts.append(f"! {summary.copied} copied before in-place writes", "magenta").append("  ")
    counts.append(f"= {summary.shared} shared", "dim")
    console.print(counts)


def render_report(report: Report, console: Console) -> None:
    """One line a check."""
    for check in report:
        mark = Text("ok      ", "green") if check.ok else Text("FAILED  ", "bold red")
        console.print(mark.append(f"{check.name}: ", "default").append(check.detail, "dim"))
    for sentence in report.given_up:
        console.print(Text("given up  ", "yellow").append(sentence, "default"))
    failed = sum(not check.ok for check in report)
    total = len(report.checks)
    console.print(
        Text(f"{failed} of {total} checks failed", "bold red")
        if failed
        else Text(f"all {total} checks hold", "bold green")
    )


def _row(level: Level) -> tuple[str, ...]:
    name = "trunk" if level.level == 0 else str(level.level)
    hidden = len(level.nodes) - _SHOWN
    nodes = ", ".join(level.nodes[:_SHOWN]) + (f", ... {hidden} more" if hidden > 0 else "")
    return name, level.split or "-", str(level.branches), nodes, f"{level.parameters:,}"


def _ratio(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{_short(before)} -> {_short(after)}" + (f"  ({after / before:.2f}x)" if before else "")


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.4g}{unit}"
        number /= 1000
    raise AssertionError
