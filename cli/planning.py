"""The options that say which model, and which training graph of it: declared here, and nowhere else.

A new option of `fxcollab.transform` is a field of `Options`: every command that makes a plan has it then, functions
of the library that have a parameter of its name get it, and where it isn't given, a directory's plan answers it.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import parsing
from .completion import sources
from .console import working

if TYPE_CHECKING:
    from fxcollab.codegen.module import CollabGraphModule
    from fxcollab.proof.report import Report
    from fxcollab.sources.loaded import Loaded
    from fxcollab.splits.choice import Choice

SOURCES = "model.py, model.py:NAME, package.module:NAME, torchvision:NAME, timm:NAME, hf:NAME_OR_PATH"
DIRECTORY = "a directory that transform wrote"
MODEL_OPTIONS = ("source", "input", "model_arg", "granularity", "seed", "trust_source")
"""Options of commands that make no plan."""
GROUPS = {
    "Model": ("input", "model_arg", "granularity", "seed"),
    "Heads": ("pattern", "splits", "heads", "fanouts", "max_time", "max_memory"),
    "Training": ("init", "fresh", "rescale", "peers", "recompute", "eval_output"),
}
"""What options are about, by their fields; those of a command alone are in none."""


def option(help: str, metavar: str | None = None, *flags: str, values: tuple[str, ...] = ()) -> Any:
    """An option named like its field, or by ``flags``; ``values`` are for completion."""
    complete = (lambda: list(values)) if values else None
    return typer.Option(*flags, help=help, metavar=metavar, autocompletion=complete)


_Source = typer.Argument(
    help=f"{SOURCES}, or {DIRECTORY}.", metavar="SOURCE", show_default=False, autocompletion=sources
)
_PATTERNS = ("multi-instance", "simple", "hierarchical", "ladder")
_Pattern = option(f"{', '.join(_PATTERNS)}, or package.module:NAME.", values=_PATTERNS)
_INITS = ("fresh", "copy", "copy-anyway", "finetune")
_Init = option(
    "How peers start: fresh, finetune (all but the last layer as copies), copy or copy-anyway.", values=_INITS
)
_Recompute = option("Keep one branch's activations at a time; compute again.", "heads", values=("heads",))
_EvalOutput = option("What eval mode returns: head (head 0), all or mean.", values=("head", "all", "mean"))
_Granularity = option("auto opens what the splits need; op down to operations.", values=("auto", "op"))
_Trust = option("Run the code that a stranger's directory names.", None, "--trust-source")


@dataclass(frozen=True)
class Options:
    """The model that a command is about, and the plan of its training graph.

    Attributes:
        given: the options on the command line, by their fields.
        plan: that of a directory, where `load` found one.
    """

    source: Annotated[str, _Source]
    pattern: Annotated[str, _Pattern] = "hierarchical"
    splits: Annotated[str, option("Where heads part: modules, name@2, a+b, nodes, or auto.", "A,B")] = ""
    heads: Annotated[int | None, option("Heads of simple and multi-instance (default 2).", "H")] = None
    fanouts: Annotated[str | None, option("Branches at each split (default 2 each): 2,3, 2,2:1 or auto.", "F,F")] = (
        None
    )
    init: Annotated[str, _Init] = "fresh"
    fresh: Annotated[list[str] | None, option("With --init copy: a module that starts anew, or a glob.", "NAME")] = (
        None
    )
    seed: Annotated[int, option("All initial weights are a function of it.")] = 0
    rescale: Annotated[bool, option("Where heads meet: the mean of their gradients, or the sum.")] = True
    granularity: Annotated[str, _Granularity] = "auto"
    peers: Annotated[str, option("The name under which the other heads' state lives.", "NAME")] = "peers"
    recompute: Annotated[str | None, _Recompute] = None
    eval_output: Annotated[str, _EvalOutput] = "head"
    max_time: Annotated[
        str | None, option("With --splits auto: a step's time by FLOPs, to the original's.", "1.75x")
    ] = None
    max_memory: Annotated[str | None, option("With --splits auto: a step's memory, also 20GB.", "1.5x")] = None
    input: Annotated[list[str] | None, option("1x3x224x224, or NAME=2x16:int64; for each input.", "SHAPE")] = None
    model_arg: Annotated[list[str] | None, option("An argument for the model's factory.", "K=V")] = None
    trust_source: Annotated[
        bool, option("Run the code that a stranger's directory names.", None, "--trust-source")
    ] = False
    given: Mapping[str, str] = field(default_factory=dict)
    plan: Any = None

    @property
    def is_directory(self) -> bool:
        """Whether SOURCE is a directory that transform wrote."""
        return os.path.isdir(self.source)  # noqa: PTH112 (which answers for every text)

    def refuse_with_directory(self, but: Collection[str] = ()) -> None:
        """Refuse options that a directory's plan answers, except ``--input`` and those of the fields in ``but``."""
        about_directory = ("source", "input", "trust_source", *but)
        wrong = [option for name, option in self.given.items() if name not in about_directory]
        if self.is_directory and wrong:
            from fxcollab.errors import PatternError

            raise PatternError(
                f"{', '.join(wrong)} can't be given with a directory.",
                why="its plan says how the graph was made",
                hint="leave the options out, or give the model's source with them",
            )

    def load(self) -> tuple[Options, Loaded]:
        """The options, completed by the plan where SOURCE is a directory, and the model.

        Where the model draws its weights without a seed of its own, they follow ``--seed``.
        """
        with working(f"loading {self.source}"):
            import torch

            from fxcollab.errors import SourceError
            from fxcollab.limits import check_seed
            from fxcollab.sources.load import load as load_source
            from fxcollab.sources.source import Source, parse_argument

            options = self._planned() if self.is_directory else self
            if not options.plan and ":" not in options.source and not options.source.endswith(".py"):
                what = f"`{options.source}` is not a source, and there is no such directory."
                raise SourceError(what, hint=f"write {SOURCES}, or {DIRECTORY}")
            check_seed(options.seed)
            torch.manual_seed(options.seed)
            given = dict(map(parse_argument, options.model_arg or ()))
            if options.plan:
                planned: Source = options.plan.source
                source = replace(planned, arguments=tuple(sorted({**dict(planned.arguments), **given}.items())))
            else:
                source = Source.parse(options.source, given)
            return options, load_source(source)

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The keyword arguments for ``function``: the options of which it has a parameter."""
        values = vars(self) | {
            "fanouts": parsing.fanouts(self.fanouts),
            "init": {**dict.fromkeys(self.fresh, "fresh"), "*": self.init} if self.fresh else self.init,
            "example_inputs": parsing.example_inputs(self.input, self.plan),
        }
        return {name: values[name] for name in inspect.signature(function).parameters if name in values}

    def choose(self, loaded: Loaded, *, optimizer: float = 1.0) -> Choice | None:
        """The choice of ``--splits auto``; None where splits are named, which have no budget.

        Args:
            loaded: the model.
            optimizer: values that the optimizer holds for each trained one.
        """
        with working("choosing splits"):
            from fxcollab.errors import PatternError
            from fxcollab.patterns import AUTO, fanouts_to_choose, split_names
            from fxcollab.splits.choose import choose_splits

            arguments = self.arguments(choose_splits)
            if split_names(self.splits) == (AUTO,):
                arguments["fanouts"] = fanouts_to_choose(self.pattern, self.heads, arguments["fanouts"])
                return choose_splits(loaded.model, **arguments, optimizer=optimizer)
            wrong = [option for name, option in self.given.items() if name in ("max_time", "max_memory")]
            if wrong:
                raise PatternError(
                    f"{', '.join(wrong)} can't be given with named splits.",
                    why="their costs follow from their names",
                    hint="let them be chosen: --splits auto",
                )
            return None

    def transform(self, loaded: Loaded, choice: Choice | None = None, **more: Any) -> CollabGraphModule:
        """The training model, of the splits chosen or named; ``more`` are arguments of `fxcollab.transform`."""
        with working("transforming"):
            import fxcollab

            more |= {"factory": loaded.factory, "source": loaded.source}
            if choice:
                more |= {"splits": choice, "max_time": None, "max_memory": None}
            return fxcollab.transform(loaded.model, **self.arguments(fxcollab.transform) | more)

    def training_model(self, but: Collection[str] = ()) -> CollabGraphModule:
        """The training model in a directory, or that of the model and the options.

        Args:
            but: as for `refuse_with_directory`.
        """
        self.refuse_with_directory(but)
        if not self.is_directory:
            options, loaded = self.load()
            return options.transform(loaded, options.choose(loaded))
        with working(f"loading {self.source}"):
            import fxcollab

            # as it was made; inputs are for what is computed on it
            return fxcollab.load(self.source, trust_source=self.trust_source)

    def verify(self, train_model: CollabGraphModule) -> Report:
        """The proof, on inputs of the given shapes."""
        with working("verifying") as tell:
            import fxcollab

            made = itertools.count(1)
            return fxcollab.verify(
                train_model.root,
                train_model,
                parsing.example_inputs(self.input),
                on_check=lambda check: tell(f"{next(made)} checks; {check.name}"),
            )

    def _planned(self) -> Options:
        """These options, and those of the directory's plan where none are given.

        Of the head tree's options those before the first that is given: what comes after depends on it.
        """
        from fxcollab.errors import ArtifactError
        from fxcollab.io.plan_file import read_plan_file
        from fxcollab.io.trust import refuse_strangers_code

        plan, data = read_plan_file(Path(self.source))
        if plan.source is None:
            raise ArtifactError(
                "The plan doesn't say where the model comes from.",
                where=self.source,
                why="it was made from a model object, not from a file or an importable factory",
                hint=f"give the source with the options: {SOURCES}",
            )
        refuse_strangers_code(data, plan.source, Path(self.source), self.trust_source)
        answers = vars(plan) | vars(plan.options)
        named = {option.name: answers[option.name] for option in fields(self)[1:] if option.name in answers}
        tree = takewhile(lambda option: option[0] not in self.given, parsing.tree_options(plan))
        values = {name: value for name, value in (named | dict(tree)).items() if name not in self.given}
        return replace(self, **values, plan=plan)
