"""Attempts: both modes of a model are traced, and again with helpers or examples after an error."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from fxcollab.codegen.fixed import Attributes
from fxcollab.errors import CaptureError, ForwardError
from fxcollab.functional import has_values
from fxcollab.interrupts import deferred_interrupts
from fxcollab.rng import preserve_rng_state
from fxcollab.tracing.callers import is_internal_file
from fxcollab.tracing.errors import FirstCallError, IndexAskedError, NoExampleError, UntraceableError
from fxcollab.tracing.example_values import Examples
from fxcollab.tracing.examples import example_tensors, guess_inputs
from fxcollab.tracing.helpers import Helper, innermost_helper
from fxcollab.tracing.interface import ExampleInputs, Interface
from fxcollab.tracing.leaks import purge_leaks
from fxcollab.tracing.limitations import hooked_modules
from fxcollab.tracing.proxy import readable
from fxcollab.tracing.queries import Indices, may_be_none
from fxcollab.tracing.tracer import LazyTracer
from fxcollab.tracing.twin import preserved_classes, twin_of


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be traced, and how."""

    model: nn.Module
    opened: frozenset[str]
    interface: Interface
    operators: bool
    example_inputs: ExampleInputs | None

    def examples(self) -> Iterator[Examples]:
        """Examples to try in turn: those given, or random ones of shapes that are known or guessed.

        On fake tensors first; then, unless they are guessed, on real ones, for a forward that depends on data.
        """
        if self.example_inputs is not None:
            values = self.interface.values_of(self.model, self.example_inputs)
        else:
            values = tuple(example_tensors(self.model, guess_inputs(self.model, known=self.interface)))
        yield Examples(values)
        if self.example_inputs is None and not self.interface.known:
            return
        if has_values(self.model):
            yield Examples(values, real=True)


@dataclass(frozen=True, eq=False)
class Traced:
    """The graph of one mode, and what `LazyTracer` has after the trace."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    opened: Mapping[str, nn.Module]
    attributes: Attributes
    notes: Sequence[str]


def trace_modes(request: Request) -> tuple[Traced, Traced]:
    """Trace both modes.

    Modules to which others are handed are opened, if they can be: calls of those are nodes then.
    """
    train = _Attempts(request, True, {}).trace()
    traced = train, _Attempts(request, False, train.constants).trace()
    receivers = {path for mode in traced for path in _receivers(mode.graph, request.model)}
    if receivers:
        with suppress(ForwardError):
            return trace_modes(replace(request, opened=request.opened | receivers))
    return traced


def _receivers(graph: fx.Graph, root: nn.Module) -> Iterator[str]:
    """The paths of modules that are called with other modules as arguments."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for node in graph.find_nodes(op="call_module"):
        if any(source.op == "get_attr" and source.target in modules for source in node.all_input_nodes):
            yield str(node.target)


class _Attempts:
    """Attempts to trace one mode, of which each decides what is different in the next.

    After an error in a helper function, calls of it are recorded as one node, which has concrete values at every
    call. After any other, an index that was refused is given, or the next examples are used. Where a helper is a
    node only because of what it asked, and the code around it then asks whether its result is true, nothing is won:
    it is traced after all.
    """

    def __init__(self, request: Request, training: bool, constants: Mapping[str, Tensor]) -> None:
        self._request, self._training, self._constants = request, training, constants
        self._candidates = request.examples()
        # The members of structured inputs only an example has.
        self._examples = next(self._candidates) if request.interface.structured else None
        self._helpers, self._never_nodes = list[Helper](), list[Helper]()
        self._tentative = list[Helper]()  # helpers that only asked, or failed before there were examples
        self._indices = Indices()

    def trace(self) -> Traced:
        """The first success."""
        while True:
            with deferred_interrupts() as answer_interrupt, purge_leaks():
                traced = self._attempt(answer_interrupt)
            if traced is not None:
                return traced

    def _attempt(self, answer_interrupt: Callable[[], None]) -> Traced | None:
        with preserved_classes(self._request.model):
            return self._attempt_on_twin(answer_interrupt)

    def _attempt_on_twin(self, answer_interrupt: Callable[[], None]) -> Traced | None:
        request = self._request
        with ExitStack() as emptied:  # they are in cycles of references, and an error's frames refer to them
            try:
                twin = twin_of(request.model, self._training)
                emptied.callback(twin.forget)
                tracer = LazyTracer(
                    twin,
                    request.opened,
                    request.interface,
                    operators=request.operators,
                    constants=self._constants,
                    helpers=self._helpers,
                    never_nodes=self._never_nodes,
                    examples=self._examples,
                    indices=self._indices,
                    before_each_node=answer_interrupt,
                )
                emptied.callback(vars(tracer).clear)
                with preserve_rng_state():
                    graph = tracer.trace(twin.model)
            except FirstCallError:
                raise
            except (Exception, SystemExit, UntraceableError) as error:  # user code may raise anything on proxies
                self._change_after(error)
                return None
            if self._change_after_questions(graph, tracer):
                return None
            return Traced(graph, tracer.constants, tracer.opened, tracer.attributes, tuple(tracer.notes))

    def _change_after(self, error: BaseException) -> None:
        asked = isinstance(error, IndexAskedError)
        helper = innermost_helper(error, (*self._helpers, *self._never_nodes) if asked else self._helpers)
        if isinstance(error, NoExampleError) and self._examples is None and (found := self._first()) is not None:
            self._examples = found
        elif helper is not None:
            self._helpers.append(helper)
            self._tentative += [helper] if self._examples is None else []
        elif not self._gives_index(error):
            self._examples = _next_examples(self._candidates, error, self._request)

    def _gives_index(self, error: BaseException) -> bool:
        """Whether an index that was refused is given the next time, by the same examples."""
        place = error.place if isinstance(error, IndexAskedError) else None
        if place is None and isinstance(error, TypeError) and self._examples is not None:  # as torch has it
            place, self._indices.refused = self._indices.refused, None
        if place is None or place in self._indices.answered:
            return False
        self._indices.answered.add(place)
        return self._examples is not None

    def _change_after_questions(self, graph: fx.Graph, tracer: LazyTracer) -> bool:
        """Whether the graph is not the one that is wanted, since the forward has asked for something."""
        if tracer.asking:
            self._helpers += tracer.asking
            self._tentative += (helper for helper, yes_or_no in tracer.asking.items() if yes_or_no)
            return True
        undone = [helper for helper in self._tentative if helper in tracer.asked]
        if undone:
            self._never_nodes += undone
            for known in (self._helpers, self._tentative):
                known[:] = [helper for helper in known if helper not in undone]
            return True
        if self._examples is None:
            self._examples = self._examples_with_none(graph, tracer)
            return self._examples is not None
        return False

    def _first(self) -> Examples | None:
        try:
            return next(self._candidates, None)
        except CaptureError:  # none can be guessed
            return None

    def _examples_with_none(self, graph: fx.Graph, tracer: LazyTracer) -> Examples | None:
        """Examples for which a module returns None among other values; None if there are none.

        Without them ``if mask is None`` was false in the trace, as ``mask`` was a proxy.
        """
        parts = [node for node in graph.nodes if _is_part_of_a_call(node)]
        if not parts:
            return None
        reason = "there is no example"
        while True:
            try:
                examples = next(self._candidates)
                values = tracer.values_for(examples)
                return examples if any(values.value(node) is None for node in parts) else None
            except StopIteration:
                break
            except CaptureError as error:
                reason = error.what
                break
            except (Exception, UntraceableError) as error:  # user code may raise anything on examples
                reason = f"{type(error).__name__}: {error}"
        tracer.notes[f"whether a part of what {parts[0].args[0]} returns is None is not known ({reason})"] = None
        return None


def _next_examples(candidates: Iterator[Examples], error: BaseException, request: Request) -> Examples:
    """The next examples; where there are none left, ``error`` is reported."""
    hint = (
        "put the splits at modules further out, so that this code stays inside a leaf module; or move the code that "
        "needs concrete values into a module of its own"
    )
    try:
        return next(candidates)
    except StopIteration:
        pass
    except CaptureError as missing:
        hint = f"{missing.hint}; or {hint}"
    why = readable(f"{type(error).__name__}: {error}")
    own = request.model._forward_pre_hooks or request.model._forward_hooks
    hooked = [path for path in hooked_modules(request.model) if path not in request.opened]
    hooked = ["the root", *hooked] if own else hooked
    if isinstance(error, LookupError | AttributeError | TypeError) and hooked:  # it reads what they should have left
        why += f" (hooks of {', '.join(hooked[:4])} don't run while the forward is traced: "
        why += "if they make at the first call what is missing, call the model once before)"
    raise ForwardError(
        f"The forward of {type(request.model).__qualname__} can't be captured.",
        where=_user_line(error),
        why=why,
        hint=hint,
    ) from error


def _user_line(error: BaseException) -> str | None:
    """The innermost line of user code in the traceback."""
    trace, found = error.__traceback__, None
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if not is_internal_file(file):
            found = f"{file}:{line}, in {trace.tb_frame.f_code.co_qualname}"
        trace = trace.tb_next
    return found


def _is_part_of_a_call(node: fx.Node) -> bool:
    """Whether it is ``outputs[1]``, ``outputs[:2][1]`` or ``outputs.aux`` of what a module or a helper returned.

    ``x[:, 0]`` is an operation on a tensor, and so are a tensor's attributes.
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
