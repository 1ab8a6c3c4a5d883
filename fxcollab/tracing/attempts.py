"""Attempts: both modes of a model are traced, and again with helpers or examples after an error."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from fxcollab.errors import CaptureError, ForwardError
from fxcollab.rng import preserve_rng_state
from fxcollab.tracing.callers import is_internal_file
from fxcollab.tracing.errors import FirstCallError, NoExampleError, UntraceableError
from fxcollab.tracing.example_values import Examples
from fxcollab.tracing.examples import example_tensors, guess_inputs
from fxcollab.tracing.helpers import Helper, innermost_helper
from fxcollab.tracing.interface import ExampleInputs, Interface
from fxcollab.tracing.leaks import purge_caches
from fxcollab.tracing.limitations import hooked_modules
from fxcollab.tracing.proxy import readable
from fxcollab.tracing.queries import may_be_none
from fxcollab.tracing.tracer import LazyTracer
from fxcollab.tracing.twin import Attributes, preserved_classes, twin_of


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be traced, and how."""

    model: nn.Module
    opened: frozenset[str]
    interface: Interface
    operators: bool
    example_inputs: ExampleInputs | None

    def traced(self) -> Iterable[str]:
        """The paths of the modules that may be traced into."""
        return (path for path, _ in self.model.named_modules()) if self.operators else self.opened

    def examples(self) -> Iterator[Examples]:
        """Examples to try in turn: those given, or random ones of shapes that are known or guessed.

        On fake tensors first; then, unless they are guessed, on real ones, for a forward that depends on data.
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
class Traced:
    """The graph of one mode, and what happened while it was traced."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    opened: Mapping[str, nn.Module]
    helpers: Sequence[Helper]
    shared: Sequence[str]
    notes: Iterable[str]
    assigned: Sequence[str]


def trace_modes(request: Request, proxies: list[weakref.ref[fx.Proxy]]) -> tuple[Traced, Traced]:
    """Trace both modes.

    Modules to which others are handed are opened, if they can be: calls of those are nodes then.
    """
    train = _trace_mode(request, True, {}, proxies)
    traced = train, _trace_mode(request, False, train.constants, proxies)
    receivers = {path for mode in traced for path in _receivers(mode.graph, request.model)}
    if receivers:
        with suppress(ForwardError):
            return trace_modes(replace(request, opened=request.opened | receivers), proxies)
    return traced


def _receivers(graph: fx.Graph, root: nn.Module) -> Iterator[str]:
    """The paths of modules that are called with other modules as arguments."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for node in graph.find_nodes(op="call_module"):
        if any(source.op == "get_attr" and source.target in modules for source in node.all_input_nodes):
            yield str(node.target)


def _trace_mode(
    request: Request, training: bool, constants: Mapping[str, Tensor], proxies: list[weakref.ref[fx.Proxy]]
) -> Traced:
    """Trace one mode, and try again after an error.

    After one in a helper function, calls of it are recorded as one node, which has concrete values at every call.
    After any other, the next examples are used. Where a helper is a node only because of what it asked, and
    the code around it then asks whether its result is true, nothing is won: it is traced after all.
    """
    model, helpers = request.model, list[Helper]()
    early, askers, never_nodes = list[Helper](), list[Helper](), list[Helper]()
    candidates = request.examples()
    examples = next(candidates) if request.interface.structured else None  # whose members only an example has
    while True:
        purge_caches(proxies)  # of the attempt before, whose frames are gone by now
        proxies.clear()
        try:
            twin = twin_of(model, training)
            tracer = LazyTracer(
                twin,
                request.opened,
                request.interface,
                operators=request.operators,
                constants=constants,
                helpers=helpers,
                never_nodes=never_nodes,
                examples=examples,
                proxies=proxies,
            )
            with preserve_rng_state(), preserved_classes(model):
                before = Attributes(twin.model, request.traced())
                graph = tracer.trace(twin.model)
                changed = before.changed()
        except FirstCallError:
            raise
        except (Exception, SystemExit, UntraceableError) as error:  # user code may raise anything on proxies
            helper = innermost_helper(error, helpers)
            if isinstance(error, NoExampleError) and examples is None and (found := _first(candidates)) is not None:
                examples = found
            elif helper is not None:
                helpers.append(helper)
                early += [helper] if examples is None else []  # with examples it may have what it needs
            else:
                examples = _next_examples(candidates, error, request)
        else:
            twin.forget()
            if tracer.asking:
                helpers += tracer.asking
                askers += (helper for helper, yes_or_no in tracer.asking.items() if yes_or_no)
                continue
            if undone := [helper for helper in (*early, *askers) if helper in tracer.asked]:
                never_nodes += [helper for helper in undone if helper in askers]
                for known in (helpers, early, askers):
                    known[:] = [helper for helper in known if helper not in undone]
                continue
            needed = _examples_with_none(graph, tracer, candidates) if examples is None else None
            if needed is None:
                opened = {path: model.get_submodule(path) for path in tracer.opened}
                traced = Traced(graph, tracer.constants, opened, helpers, twin.shared, tracer.notes, changed)
                vars(tracer).clear()  # it is in cycles of references, with the twin
                return traced
            examples = needed


def _first(candidates: Iterator[Examples]) -> Examples | None:
    try:
        return next(candidates, None)
    except CaptureError:  # none can be guessed
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


def _examples_with_none(graph: fx.Graph, tracer: LazyTracer, candidates: Iterator[Examples]) -> Examples | None:
    """Examples for which a module returns None among other values; None if there are none.

    Without them ``if mask is None`` was false in the trace, as ``mask`` was a proxy.
    """
    parts = [node for node in graph.nodes if _is_part_of_a_call(node)]
    if not parts:
        return None
    reason = "there is no example"
    while True:
        try:
            examples = next(candidates)
            example_values = tracer.values_for(examples)
            return examples if any(example_values.value(node) is None for node in parts) else None
        except StopIteration:
            break
        except CaptureError as error:
            reason = error.what
            break
        except (Exception, UntraceableError) as error:  # user code may raise anything on examples
            reason = f"{type(error).__name__}: {error}"
    tracer.notes[f"whether a part of what {parts[0].args[0]} returns is None is not known ({reason})"] = None
    return None


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
