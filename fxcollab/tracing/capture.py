"""Capture: a model becomes a graph, opened only as far as the splits need."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxcollab.codegen.modes import Modes, set_mode
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import CaptureError, ForwardError
from fxcollab.fx_utils import copy_graph
from fxcollab.rng import preserve_rng_state
from fxcollab.tracing.answers import may_be_none
from fxcollab.tracing.callers import belongs_to_the_machinery
from fxcollab.tracing.errors import NoExampleError, UntraceableError
from fxcollab.tracing.example_values import Examples, ExampleValues
from fxcollab.tracing.examples import example_tensors, guess_inputs
from fxcollab.tracing.helpers import Helper, innermost_helper
from fxcollab.tracing.interface import ExampleInputs, Interface, forward_of, interface_of
from fxcollab.tracing.leaks import purge_caches, purge_leaked_proxies
from fxcollab.tracing.limitations import limitations
from fxcollab.tracing.preserve import preserved
from fxcollab.tracing.proxy import readable
from fxcollab.tracing.tracer import LazyTracer

Granularity = Literal["auto", "op"]
LIMITATIONS_KEY = "fxcollab_limitations"
CAPTURE_KEY = "fxcollab_capture"


@dataclass(frozen=True)
class CaptureOptions:
    """How a model was captured; ``captured.meta[CAPTURE_KEY]``.

    Attributes:
        granularity: how far the model was opened.
        interface: the graph's inputs.
    """

    granularity: Granularity
    interface: Interface


def capture(
    model: nn.Module,
    splits: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
    granularity: Granularity = "auto",
    *,
    interface: Interface | None = None,
) -> CollabGraphModule:
    """The model as a graph over its own modules.

    Only the modules that contain a split are opened; every other module stays one node, the same object with
    its hooks, parametrizations and train/eval behaviour. Both modes are traced: where a forward reads
    ``self.training``, the captured module follows ``.train()`` and ``.eval()``.

    Args:
        model: any module, on any device; a ``GraphModule`` is taken as it is and never traced again.
        splits: split names whose enclosing modules are opened.
        example_inputs: tuple or dict. Tensors in it become inputs, also for optional parameters; other values
            are fixed. Questions that a forward asks while it is traced are answered by these examples.
        granularity: ``"auto"`` opens only what the splits need, ``"op"`` down to torch's own layers.
        interface: that of an earlier capture, to be used again without examples.

    Returns:
        A ``GraphModule`` whose state dict is that of ``model``, key for key, with the same tensors.

    Raises:
        ForwardError: that of an opened module can't be traced; the model is as it was.
        CaptureError: it has no inputs, or parameters without a shape.
    """
    if granularity not in ("auto", "op"):
        raise CaptureError(f"There is no granularity {granularity!r}.", hint="use 'auto' or 'op'")
    interface = interface or interface_of(model, example_inputs)
    options = CaptureOptions(granularity, interface)
    if isinstance(model, fx.GraphModule):
        return _adopt(model, options)
    _refuse_lazy_modules(model)
    _refuse_no_inputs(model, interface)
    opened = opened_paths(model, splits)
    request = _Request(model, opened, interface, granularity == "op", example_inputs)
    train = _trace_mode(request, True)
    evaluation = _trace_mode(request, False, train.constants)
    captured = CollabGraphModule(model, Modes.merged(train.graph, evaluation.graph), constants=evaluation.constants)
    captured.meta[CAPTURE_KEY] = options
    captured.meta[LIMITATIONS_KEY] = (
        *limitations({**train.opened, **evaluation.opened}, interface),
        *_compromises(train, evaluation),
    )
    return captured


@dataclass(frozen=True, eq=False)
class _Request:
    """What is to be traced: the model, what is opened, what are inputs, and examples of them."""

    model: nn.Module
    opened: frozenset[str]
    interface: Interface
    operators: bool
    example_inputs: ExampleInputs | None

    def examples(self) -> Iterator[Examples]:
        """A value for each input: the given ones, or random ones of the shapes that are known or guessed.

        Fake tensors first; real ones, given or of given shapes and not guessed, where the answers depend on data.
        """
        if self.example_inputs is not None:
            values = self.interface.values_of(self.model, self.example_inputs)
        else:
            values = tuple(example_tensors(self.model, self._known_interface))
        yield Examples(values)
        if self.example_inputs is None and not self.interface.known:
            return
        if not any(tensor.is_meta for tensor in (*self.model.parameters(), *self.model.buffers())):
            yield Examples(values, real=True)

    @cached_property
    def _known_interface(self) -> Interface:
        return self.interface if self.interface.known else guess_inputs(self.model, known=self.interface)


@dataclass(frozen=True, eq=False)
class _Traced:
    """One mode's graph, and how it came about."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    opened: Mapping[str, nn.Module]
    helpers: tuple[Helper, ...]
    notes: tuple[str, ...]
    assigned: tuple[str, ...]
    drew: bool


def _trace_mode(request: _Request, training: bool, constants: Mapping[str, Tensor] | None = None) -> _Traced:
    """Trace one mode, giving way where the forward resists.

    A helper function that asks for values becomes one node, and asks at every call. Where a module's own forward
    asks, an example answers.
    """
    with purge_leaked_proxies() as proxies:
        return _tried(request, training, constants, proxies)


def _tried(
    request: _Request,
    training: bool,
    constants: Mapping[str, Tensor] | None,
    proxies: list[weakref.ref[fx.Proxy]],
) -> _Traced:
    model, helpers = request.model, list[Helper]()
    resorts = request.examples()
    examples = next(resorts) if request.interface.structured else None  # only an example tells of what
    while True:
        purge_caches(proxies)  # of the attempt before, whose error is gone
        proxies.clear()
        try:
            # what one mode sets or draws must not be seen in the other
            with preserve_rng_state() as generators, preserved(model.modules()) as assigned:
                tracer = LazyTracer(
                    request.opened,
                    request.interface,
                    operators=request.operators,
                    constants=constants,
                    helpers=helpers,
                    examples=examples,
                    proxies=proxies,
                )
                set_mode(model, training)
                graph = tracer.trace(model)
                drew = generators.foreign_numbers_were_drawn()
                changed = assigned()
        except (Exception, SystemExit, UntraceableError) as error:  # whatever the user's code raises on proxies
            helper = innermost_helper(error, helpers)
            if isinstance(error, NoExampleError) and examples is None and (found := _first(resorts)) is not None:
                examples = found
            elif helper is not None:
                helpers.append(helper)
            else:
                examples = _next_resort(resorts, error, request)
        else:
            with preserved(model.modules()):
                set_mode(model, training)
                deceived = _with_absent_values(model, graph, tracer, resorts) if examples is None else None
            if deceived is not None:
                examples = deceived
                continue
            return _Traced(graph, tracer.constants, tracer.opened, tuple(helpers), tuple(tracer.notes), changed, drew)


def _first(resorts: Iterator[Examples]) -> Examples | None:
    try:
        return next(resorts, None)
    except CaptureError:  # none can be guessed
        return None


def _with_absent_values(
    model: nn.Module, graph: fx.Graph, tracer: LazyTracer, resorts: Iterator[Examples]
) -> Examples | None:
    """Examples for which a module returns None among other values.

    To the forward it looked like a value: ``if mask is None`` was decided wrongly, and needs the examples.
    """
    unpacked = [node for node in graph.nodes if _is_part_of_a_call(node)]
    if not unpacked:
        return None
    reason = "there is no example"
    while True:
        try:
            examples = next(resorts)
            example_values = ExampleValues(model, examples, tracer.tensors)
            return examples if any(example_values.value(node) is None for node in unpacked) else None
        except StopIteration:
            break
        except CaptureError as error:
            reason = error.what
            break
        except (Exception, UntraceableError) as error:  # whatever the user's code raises on examples
            reason = f"{type(error).__name__}: {error}"
    called = unpacked[0].args[0]
    tracer.notes[f"whether a part of what {called} returns is None could not be seen ({reason})"] = None
    return None


def _is_part_of_a_call(node: fx.Node) -> bool:
    """``outputs[1]``, ``outputs[:2][1]`` or ``outputs.aux`` of what a module returned, and what a helper returns.

    ``x[:, 0]`` is no part but an operation, and so are a tensor's attributes.
    """
    value: Any = node
    while isinstance(value, fx.Node) and value.target in (operator.getitem, getattr, "get"):
        key = value.args[1]
        if not isinstance(key, int | str | slice) or hasattr(Tensor, str(key)):
            return False
        value = value.args[0]
    if value is node:
        return node.target is not operator.getitem and may_be_none(node)
    return isinstance(value, fx.Node) and (value.op == "call_module" or may_be_none(value))


def _next_resort(resorts: Iterator[Examples], error: BaseException, request: _Request) -> Examples:
    refusal = _refusal(request.model, error)
    try:
        return next(resorts)
    except StopIteration:
        raise refusal from error
    except CaptureError as missing:
        refusal.hint = f"{missing.hint}; or {refusal.hint}"
        raise refusal from error


def _compromises(train: _Traced, evaluation: _Traced) -> tuple[str, ...]:
    helpers = dict.fromkeys(helper.title for helper in (*train.helpers, *evaluation.helpers))
    notes = dict.fromkeys((*train.notes, *evaluation.notes))
    assigned = dict.fromkeys((*train.assigned, *evaluation.assigned))
    drew = train.drew or evaluation.drew
    return (
        *(f"what the forward assigns to {name} is not kept: the graph reads the value it had" for name in assigned),
        *["random numbers of Python or numpy were drawn while tracing and are constants of the graph"] * drew,
        *(f"function {title} can't be traced and is kept whole as one node" for title in helpers),
        *notes,
    )


def opened_paths(model: nn.Module, splits: Iterable[str]) -> frozenset[str]:
    """The root and every module that properly contains a split; names that are no modules open nothing."""
    modules = dict(model.named_modules(remove_duplicate=False))
    canonical = {module: path for path, module in reversed(modules.items())}  # a graph uses the first path
    opened = {""}
    for split in splits:
        for part in split.split("+"):
            path = part.strip().partition("@")[0]
            if path in modules:
                atoms = path.split(".")[:-1]
                opened |= {canonical[modules[".".join(atoms[: i + 1])]] for i in range(len(atoms))}
    return frozenset(opened)


def _adopt(model: fx.GraphModule, options: CaptureOptions) -> CollabGraphModule:
    modes = model.modes if isinstance(model, CollabGraphModule) else Modes(model.graph, model.graph)
    captured = CollabGraphModule(model, modes.map(copy_graph))
    captured.meta[CAPTURE_KEY] = options
    captured.meta[LIMITATIONS_KEY] = model.meta.get(LIMITATIONS_KEY, ())
    return captured


def _refusal(model: nn.Module, error: BaseException) -> ForwardError:
    return ForwardError(
        f"The forward of {type(model).__qualname__} can't be captured.",
        where=_where(error),
        why=readable(f"{type(error).__name__}: {error}"),
        hint="put the splits at modules further out, so that this code stays inside a module kept whole; "
        "or move the code that asks for values into a module of its own",
    )


def _where(error: BaseException) -> str | None:
    """The innermost line of the user's own code."""
    trace, found = error.__traceback__, None
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if not belongs_to_the_machinery(file):
            found = f"{file}:{line}, in {trace.tb_frame.f_code.co_qualname}"
        trace = trace.tb_next
    return found


def _refuse_no_inputs(model: nn.Module, interface: Interface) -> None:
    if not interface.inputs:
        raise CaptureError(
            f"{type(model).__qualname__} has no required input, so nothing says what its graph takes.",
            where=forward_of(model),
            hint="give example_inputs: a dict of the keyword inputs you train with",
        )


def _refuse_lazy_modules(model: nn.Module) -> None:
    names = [name for name, tensor in model.named_parameters() if torch.nn.parameter.is_lazy(tensor)]
    if names:
        raise CaptureError(
            "The model has parameters without a shape.",
            where=", ".join(names[:4]),
            why="lazy modules get their parameters at the first call",
            hint="call the model once on an example, then transform it",
        )
