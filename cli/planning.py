"""The plan that a command's options describe: the model, its splits, its training graph."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import typer

from .parsing import budget, example_inputs, fanouts, input_spec

if TYPE_CHECKING:
    from torch import Tensor

    from fxcollab.codegen.module import CollabGraphModule
    from fxcollab.sources.loaded import Loaded
    from fxcollab.splits.explain import Choice


@dataclass(frozen=True)
class Planning:
    """Options that make a plan, as they were given; a command has some or all of them.

    The names are those of the commands' parameters, `fxcollab_cli.options` says what they mean.
    """

    source: str
    seed: int
    granularity: str
    pattern: str = "hierarchical"
    splits: str = ""
    heads: int | None = None
    fanouts: str | None = None
    input_shapes: list[str] | None = None
    model_arg: list[str] | None = None
    init: str = "fresh"
    no_rescale: bool = False
    peers: str = "peers"
    recompute: str | None = None
    max_time: str | None = None
    max_memory: str | None = None
    measure: bool = False

    @classmethod
    def of(cls, context: typer.Context) -> Planning:
        """What was given to a command."""
        given: dict[str, Any] = context.params
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})

    @property
    def inputs(self) -> tuple[Tensor, ...] | None:
        """Random inputs of the given shapes."""
        return example_inputs(self.input_shapes)

    def load(self) -> Loaded:
        """The model that SOURCE names."""
        return load_source(self.source, self.model_arg, self.seed)

    def choose(self, loaded: Loaded, *, optimizer: float = 1.0, always_measured: bool = False) -> Choice | None:
        """What ``--splits auto`` comes to; None where splits are named, which have no budget.

        Args:
            loaded: the model.
            optimizer: values that it holds a trained one.
            always_measured: whether ``--measure`` means something with named splits, too.
        """
        from fxcollab.splits.choose import choose_splits
        from fxcollab.splits.errors import refuse_budget_with_recompute
        from fxcollab.tree import AUTO, fanouts_to_choose, split_names

        limits = budget(self.max_time, "--max-time"), budget(self.max_memory, "--max-memory")
        if split_names(self.splits) != (AUTO,):
            self._refuse_budgets(always_measured)
            return None
        refuse_budget_with_recompute(self.recompute, *limits)
        return choose_splits(
            loaded.model,
            self.inputs,
            fanouts=fanouts_to_choose(self.pattern, self.heads, fanouts(self.fanouts)),
            max_time=limits[0],
            max_memory=limits[1],
            granularity=self.granularity,  # type: ignore[arg-type]  # refused there if unknown
            measure=self.measure,
            optimizer=optimizer,
        )

    def _refuse_budgets(self, always_measured: bool) -> None:
        from fxcollab.errors import PatternError

        measuring = None if always_measured else self.measure or None
        given = ("--max-time", self.max_time), ("--max-memory", self.max_memory), ("--measure", measuring)
        wrong = [option for option, value in given if value is not None]
        if wrong:
            raise PatternError(
                f"{', '.join(wrong)} can't be given with named splits.",
                why="their costs follow from their names",
                hint="let them be chosen: --splits auto",
            )

    def transform(self, loaded: Loaded, choice: Choice | None = None) -> CollabGraphModule:
        """The training model; ``choice`` is what ``--splits auto`` came to."""
        import fxcollab

        return fxcollab.transform(
            loaded.model,
            self.pattern,  # type: ignore[arg-type]  # refused there if unknown
            choice or self.splits,
            heads=self.heads,
            fanouts=fanouts(self.fanouts),
            example_inputs=self.inputs,
            init=self.init,  # type: ignore[arg-type]
            seed=self.seed,
            rescale=not self.no_rescale,
            granularity=self.granularity,  # type: ignore[arg-type]
            factory=loaded.factory,
            source=loaded.source,
            peers=self.peers,
            recompute=self.recompute,  # type: ignore[arg-type]
        )


def load_source(text: str, model_args: list[str] | None, seed: int) -> Loaded:
    """The model that SOURCE names; where it draws its weights without a seed of its own, they follow ``seed``."""
    import torch

    from fxcollab.sources.load import load
    from fxcollab.sources.source import Source, parse_argument

    torch.manual_seed(seed)
    return load(Source.parse(text, dict(parse_argument(argument) for argument in model_args or ())))


def check_inputs(train_model: CollabGraphModule, shapes: list[str] | None) -> None:
    """Refuse given inputs on which the model fails; tried on fake tensors."""
    if not shapes:
        return
    from fxcollab.plan import plan_of
    from fxcollab.tracing.examples import why_not
    from fxcollab.tracing.interface import Interface

    planned = plan_of(train_model).interface
    if len(shapes) != len(planned.inputs):
        return  # binding them to the forward says so
    specs = tuple(input_spec(spec.name, text) for spec, text in zip(planned.inputs, shapes, strict=True))
    reason = why_not(train_model.root, Interface(specs, planned.fixed, planned.defaults))
    if reason:
        raise failing_on(shapes, reason)


def failing_on(shapes: list[str], why: str) -> Exception:
    """The error for given inputs on which the model fails."""
    from fxcollab.errors import CaptureError

    return CaptureError(
        f"The model fails on input {', '.join(shapes)}.",
        why=why,
        hint="give what the model takes, one --input for each of its inputs: --input 1x3x224x224",
    )
