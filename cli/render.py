"""Summaries and reports for people."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from .console import out

if TYPE_CHECKING:
    from fxcollab.costs.costs import Costs
    from fxcollab.costs.summary import Level, Summary
    from fxcollab.proof.report import Report
    from fxcollab.splits.candidates import Candidate
    from fxcollab.splits.choice import Choice

_SHOWN = 4
_INDENT = 12


def render_summary(summary: Summary, choice: Choice | None) -> None:
    """How splits were chosen, heads, levels, what was cloned and rescaled, parameters and FLOPs to the original's."""
    if choice:
        render_choice(choice)
    again = ", heads computed again in the backward" if summary.recompute else ""
    out().print(f"{summary.heads} heads, {summary.pattern}, seed {summary.seed}, init {summary.init}{again}")
    _print_entry(Text("start"), Text(summary.start))
    for level in summary.levels:
        _print_entry(Text(f"level {level.level}" if level.level else "trunk"), _level(level))
    _print_entry(Text("parameters"), Text(_ratio(summary.parameters)))
    for label, text in _costs(summary):
        _print_entry(Text(label), Text(text))
    _print_limitations(summary.limitations)
    out().print(_counts(summary))


def render_report(report: Report) -> None:
    """One entry a check."""
    for check in report:
        mark = Text("ok", "green") if check.ok else Text("FAILED", "bold red")
        _print_entry(mark, Text(f"{check.name}: ").append(check.detail, "dim"))
    _print_limitations(report.limitations)
    failed, total = sum(not check.ok for check in report), len(report.checks)
    verdict = Text(f"{failed} of {total} checks failed", "bold red")
    out().print(verdict if failed else Text(f"all {total} checks hold", "bold green"))


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
    old, new = costs.original, costs.training
    rows = [
        ("FLOPs", _ratio((old.flops, new.flops)), "of a training step" + ", input guessed: set --input" * guessed),
        ("parameters", _ratio((old.parameters, new.parameters)), ""),
        ("activations", _ratio((old.activations, new.activations), "B"), "kept for the backward"),
        ("memory", _ratio((old.memory, new.memory), "B"), "peak of a step: state, gradients, optimizer, activations"),
    ]
    for label, text, meaning in rows:
        _print_entry(Text(label), Text(f"{text}  ").append(meaning, "dim"))


def _crossing(candidate: Candidate) -> str:
    count, size = candidate.crossing
    return f"{count} values, {size / 1e6:.1f} MB"


def render_candidates(found: Sequence[Candidate]) -> None:
    """A table: one row a candidate, those at which a stage ends in bold and marked."""
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
    out().print(Text(told, "dim"))


def _print_limitations(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        _print_entry(Text("limitation", "yellow"), Text(sentence))


def _print_entry(label: Text, text: Text) -> None:
    """A label, and text that wraps beside it; one line an entry in a pipe, for grep."""
    console = out()
    wraps = console.is_terminal or "COLUMNS" in os.environ
    for line in text.wrap(console, console.width - _INDENT, overflow="fold") if wraps else [text]:
        line.rstrip()
        label.pad_right(_INDENT - len(label))
        out().print(label + line)
        label = Text()


def _level(level: Level) -> Text:
    hidden = len(level.nodes) - _SHOWN
    nodes = ", ".join(level.nodes[:_SHOWN]) + (f", ... {hidden} more" if hidden > 0 else "")
    number, size = level.branches, f"{level.parameters:,} parameters"
    place = f"{number} branches behind {level.split or 'the inputs'}, {size} each" if level.level else f"once, {size}"
    return Text(f"{place}: ").append(nodes or "nothing", "dim")


def _costs(summary: Summary) -> Iterator[tuple[str, str]]:
    """FLOPs and memory of a training step."""
    if summary.costs is None:
        yield "FLOPs", f"unknown: {summary.costs_unknown or 'no input is known'} (set --input)"
        return
    old, new = summary.costs.original, summary.costs.training
    guessed = ", guessed: set --input" if summary.guessed else ""
    yield "FLOPs", f"{_ratio((old.flops, new.flops))}  a training step, input {summary.inputs}{guessed}"
    yield "memory", f"{_ratio((old.memory, new.memory), 'B')}  its peak, with SGD and momentum"


def _counts(summary: Summary) -> Text:
    counts = Text()
    counts.append(f"+ {summary.cloned} cloned", "green").append("  ")
    counts.append(f"~ {summary.rescaled} rescaled", "yellow").append("  ")
    if summary.copied:
        counts.append(f"! {summary.copied} copied before in-place writes", "magenta").append("  ")
    return counts.append(f"= {summary.shared} shared", "dim")


def _ratio(pair: tuple[int, int], unit: str = "") -> str:
    before, after = pair
    return f"{_short(before)}{unit} -> {_short(after)}{unit}" + (f"  ({after / before:.2f}x)" if before else "")


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.4g}{unit}"
        number /= 1000
    raise AssertionError
