"""A function of `Options` as a command: Typer sees every field as an option of its own."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Collection
from importlib import import_module
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from .console import working
from .interrupt import stop
from .planning import GROUPS, Options

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what fxcollab wrote there.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


class Grouped(TyperCommand):
    """A command whose help lists options by what they are about."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write arguments, then the groups, then what is the command's own."""
        titles = {name: title for title, names in GROUPS.items() for name in names}
        sections: dict[str, list[Any]] = {title: [] for title in ("Arguments", *GROUPS, "Options")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            is_argument = parameter.param_type_name == "argument"
            if record is not None:
                sections["Arguments" if is_argument else titles.get(str(parameter.name), "Options")].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def command(function: Callable[..., None], only: Collection[str] | None = None) -> Callable[..., None]:
    """Expand the parameter ``options`` of a function, if it has one, and add ``--debug``.

    Args:
        function: what the command does.
        only: the fields of `Options` that it takes; all where None.
    """
    own = {name: parameter for name, parameter in signature(function).parameters.items() if name != "options"}
    hints = get_type_hints(function, include_extras=True) | get_type_hints(Options, include_extras=True)
    shared = {
        name: parameter
        for name, parameter in signature(Options).parameters.items()
        if "options" in hints and get_origin(hints[name]) is Annotated and (only is None or name in only)
    }

    @functools.wraps(function)
    def run(context: typer.Context, debug: bool, **values: Any) -> None:
        if shared:
            given = {name: option for name, option in _given(context).items() if name in shared}
            values["options"] = Options(**{name: values.pop(name) for name in shared}, given=given)
        with working("importing"):
            import_module("fxcollab")  # before there is something to clean up
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        function(**values)

    parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, parameter in (shared | own).items():
        parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
    parameters.append(Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=_Debug))
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _given(context: typer.Context) -> dict[str, str]:
    """The parameters on the command line, with the names of their options."""
    found = {}
    for parameter in context.command.params:
        where = context.get_parameter_source(str(parameter.name))
        if where is not None and where.name == "COMMANDLINE":
            found[str(parameter.name)] = max((*parameter.opts, *parameter.secondary_opts), key=len)
    return found
