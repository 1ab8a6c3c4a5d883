"""Capture: a model becomes a graph; only modules that contain a split are traced into."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from fxcollab._torch import PyTreeCodeGen, codegen_of, is_compiled
from fxcollab.codegen.modes import Modes
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import CaptureError, ForwardError
from fxcollab.rng import preserve_rng_state
from fxcollab.tracing.callers import is_internal_file
from fxcollab.tracing.errors import FirstCallError, NoExampleError, UntraceableError
from fxcollab.tracing.example_values import Examples
from fxcollab.tracing.examples import example_tensors, guess_inputs
from fxcollab.tracing.helpers import Helper, innermost_helper, is_helper
from fxcollab.tracing.interface import ExampleInputs, Interface, forward_of, interface_of
from fxcollab.tracing.leaks import purge_caches, purge_leaked_proxies, purge_leaked_tensors
from fxcollab.tracing.limitations import hooked_modules, limitations
from fxcollab.tracing.patches import overrides_call
from fxcollab.tracing.proxy import readable
from fxcollab.tracing.queries import may_be_none
from fxcollab.tracing.tracer import LazyTracer
from fxcollab.tracing.twin import Attributes, preserved_classes, twin_of

Granularity = Literal["auto", "op"]
LIMITATIONS_KEY = "fxcollab_limitations"
CAPTURE_KEY = "fxcollab_capture"


@dataclass(frozen=True)
class CaptureOptions:
    """How a model was captured; ``captured.meta[CAPTURE_KEY]``."""

    granularity: Granularity
    interface: Interface
    example_inputs: ExampleInputs | None = None


@purge_leaked_tensors()
def capture(
    model: nn.Module,
    splits: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
    granularity: Granularity = "auto",
    *,
    interface: Interface | None = None,
) -> CollabGraphModule:
    """Capture a model as a graph over its own modules.

    Only the modules that contain a split are traced into; every other module is a leaf module: one node, the same
    object with its hooks, parametrizations and train/eval behaviour. Both modes are traced: if a forward reads
    ``self.training``, the captured module follows ``.train()`` and ``.eval()``.

    Args:
        model: any module, on any device; a ``GraphModule`` is taken as it is and never traced again.
        splits: split names; the modules around them are opened, that is traced into.
        example_inputs: tuple or dict. Tensors in it become inputs, also for optional parameters; other values
            are fixed. Where a forward needs concrete values while it is traced, it gets those of the examples.
        granularity: ``"auto"`` opens only what the splits need, ``"op"`` everything down to torch's own layers.
        interface: that of an earlier capture, to be used again without examples.

    Returns:
        A ``GraphModule`` whose state dict is that of ``model``, key for key, with the same tensors.

    Raises:
        ForwardError: The forward of an opened module can't be traced; the model is restored.
        CaptureError: The model has no inputs, or parameters without a shape.
    """
    if granularity not in ("auto", "op"):
        raise CaptureError(f"There is no granularity {granularity!r}.", hint="use 'auto' or 'op'")
    _check_call(model)
    interface = interface or interface_of(model, example_inputs)
    options = CaptureOptions(granularity, interface, example_inputs)
    if isinstance(model, fx.GraphModule):
        return _adopt(model, options)
    _check_initialized(model)
    if not interface.inputs:
        raise CaptureError(
            f"{type(model).__qualname__} has no required input, so that the inputs of its graph are not known.",
            where=forward_of(model),
            hint="give example_inputs: a dict of the keyword inputs you train with",
        )
    request = _Request(model, opened_paths(model, splits), interface, granularity == "op", example_inputs)
    with purge_leaked_proxies() as proxies:
        train, evaluation = _trace_modes(request, proxies)
    captured = CollabGraphModule(model, Modes.merged(train.graph, evaluation.graph), constants=evaluation.constants)
    captured.meta[CAPTURE_KEY] = options
    captured.meta[LIMITATIONS_KEY] = (
        *limitations({**train.opened, **evaluation.opened}, interface),
        *_limitations_of_tracing(train, evaluation),
    )
    return captured


@dataclass(frozen=True, eq=False)
class _Request:
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
class _Traced:
    """The graph of one mode, and what happened while it was traced."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    opened: Mapping[str, nn.Module]
    helpers: Sequence[Helper]
    shared: Sequence[str]
    notes: Iterable[str]
    assigned: Sequence[str]


def _trace_modes(request: _Request, proxies: list[weakref.ref[fx.Proxy]]) -> tuple[_Traced, _Traced]:
    """Trace both modes.

    Modules to which others are handed are opened, if they can be: calls of those are nodes then.
    """
    train = _trace_mode(request, True, {}, proxies)
    traced = train, _trace_mode(request, False, train.constants, proxies)
    receivers = {path for mode in traced for path in _receivers(mode.graph, request.model)}
    if receivers:
        with suppress(ForwardError):
            return _trace_modes(replace(request, opened=request.opened | receivers), proxies)
    return traced


def _receivers(graph: fx.Graph, root: nn.Module) -> Iterator[str]:
    """The paths of modules that are called with other modules as arguments."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for node in graph.find_nodes(op="call_module"):
        if any(source.op == "get_attr" and source.target in modules for source in node.all_input_nodes):
            yield str(node.target)


def _trace_mode(
    request: _Request, training: bool, constants: Mapping[str, Tensor], proxies: list[weakref.ref[fx.Proxy]]
) -> _Traced:
    """Trace one mode, and try again after an error.

    After one in a helper function, calls of it are recorded as one node, which has concrete values at every call.
    After any other, the next examples are used.
    """
    model, helpers = request.model, list[Helper]()
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
            else:
                examples = _next_examples(candidates, error, request)
        else:
            twin.forget()
            if tracer.asking:
                helpers += tracer.asking
                continue
            needed = _examples_with_none(graph, tracer, candidates) if examples is None else None
            if needed is None:
                opened = {path: model.get_submodule(path) for path in tracer.opened}
                traced = _Traced(graph, tracer.constants, opened, helpers, twin.shared, tracer.notes, changed)
                vars(tracer).clear()  # it is in cycles of references, with the twin
                return traced
            examples = needed


def _first(candidates: Iterator[Examples]) -> Examples | None:
    try:
        return next(candidates, None)
    except CaptureError:  # none can be guessed
        return None


def _next_examples(candidates: Iterator[Examples], error: BaseException, request: _Request) -> Examples:
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


def _limitations_of_tracing(*modes: _Traced) -> Iterable[str]:
    assigned = [name for traced in modes for name in traced.assigned]
    helpers = [
        helper.title
        for traced in modes
        for helper in traced.helpers
        if is_helper(helper.function) and any(node.target is helper.function for node in traced.graph.nodes)
    ]
    shared = dict.fromkeys(path for traced in modes for path in traced.shared)
    sentences = (
        *(f"{path} can't be copied, so that the forward was traced with the model's own" for path in shared),
        *(f"what the forward assigns to {name} is not kept: the graph reads the value it had" for name in assigned),
        *(f"function {title} can't be traced: calls of it are one node" for title in helpers),
        *(note for traced in modes for note in traced.notes),
    )
    return dict.fromkeys(sentences)  # each once


def opened_paths(model: nn.Module, splits: Iterable[str]) -> frozenset[str]:
    """The paths of the root and of every module that contains a split; names of other nodes add none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    canonical = {module: path for path, module in reversed(modules.items())}  # the graph uses the first path
    named = {part.strip().partition("@")[0] for split in splits for part in split.split("+")}
    cut = {modules[path] for path in named if path in modules}
    paths = (path for path, module in modules.items() if module in cut)  # all names of each
    around = (list(accumulate(path.split(".")[:-1], "{}.{}".format)) for path in paths)
    return frozenset({"", *(canonical[modules[outer]] for outers in around for outer in outers)})


def _adopt(model: fx.GraphModule, options: CaptureOptions) -> CollabGraphModule:
    modes = Modes.of_graph_module(model)
    for graph in modes:
        _check_codegen(codegen_of(graph))
    captured = CollabGraphModule(model, modes)
    captured.meta[CAPTURE_KEY] = options
    captured.meta[LIMITATIONS_KEY] = getattr(model, "meta", {}).get(LIMITATIONS_KEY, ())
    return captured


def _check_codegen(codegen: CodeGen) -> None:
    if type(codegen) not in (CodeGen, PyTreeCodeGen):
        raise CaptureError(
            f"The graph generates its code with {type(codegen).__qualname__}.",
            why="it is not known how such a graph returns several outputs",
            hint="give the module itself, or torch.export.export(model, inputs).module()",
        )


def _check_call(model: nn.Module) -> None:
    if overrides_call(model):
        compiled = is_compiled(model)
        raise CaptureError(
            f"{type(model).__qualname__} {'is compiled' if compiled else 'overrides __call__'}.",
            where=f"{type(model).__qualname__}.__call__",
            why="a graph has what the forward does, and nothing of what is around it",
            hint="give the model that was compiled, and compile the training model"
            if compiled
            else "put the model into a module whose forward calls it, as in nn.Sequential(model), and transform that",
        )


def _check_initialized(model: nn.Module) -> None:
    names = [name for name, tensor in model.named_parameters() if torch.nn.parameter.is_lazy(tensor)]
    if names:
        raise CaptureError(
            "The model has parameters without a shape.",
            where=", ".join(names[:4]),
            why="lazy modules get their parameters at the first call",
            hint="call the model once on an example, then transform it",
        )
