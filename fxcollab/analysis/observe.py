"""Observe: what each node of a captured graph does, seen while the graph runs on a twin.

The graph runs node by node on fake tensors, in both modes and with two batch sizes; one that depends on the values of
its inputs runs on a copy of the model with real ones. Modes of torch see every operation: what it writes, which
storage its results share, which of the model's tensors it reads, and whether it draws random numbers. A node that
can't be run is taken to do all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import DATA_DEPENDENT_ERRORS, PyTreeCodeGen, codegen_of, pytree, storage_id
from fxcollab.analysis.effects import Effects, Observation
from fxcollab.analysis.observer import Observer, Unknown
from fxcollab.analysis.operations import Operations
from fxcollab.codegen.modes import set_mode
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import ForwardError, FxCollabError, one_line
from fxcollab.functional import has_values, named_tensors
from fxcollab.fx_utils import attribute, opened_around, place
from fxcollab.runtime.operators import guard
from fxcollab.tracing.capture import CAPTURE_KEY, CaptureOptions
from fxcollab.tracing.examples import example_tensors, failures_on, guesses
from fxcollab.tracing.interface import Interface
from fxcollab.tracing.leaks import purge_leaks
from fxcollab.tracing.limitations import hooked_modules
from fxcollab.tracing.twin import Attributes, Twin, twin_of


@purge_leaks()
def observe(captured: CollabGraphModule) -> Observation:
    """Run the graphs of a captured model, and note what their nodes do; the model is not touched.

    Raises:
        ForwardError: a graph fails on the example inputs, on which the model works.
        CaptureError: the model fails on them, too, in both modes.
    """
    examples = list(_examples(captured))
    given = captured.meta[CAPTURE_KEY].example_inputs is not None
    only_real = any(_has_no_strides(leaf) for leaf in pytree.tree_leaves(examples) if isinstance(leaf, Tensor))
    found = _observe(captured, examples, real=only_real)
    if (found.depends_on_data or (found.error and given)) and not only_real and has_values(captured):
        found = _observe(captured, examples, real=True)
    if found.error and given and not found.depends_on_data:
        _refuse_failing(captured, examples[0], found)
    effects = {node: found.effects.get(node) or _everything(node) for graph in captured.modes for node in graph.nodes}
    evaluation = {node: found.evaluation.get(node) or _everything(node) for node in captured.modes.eval.nodes}
    changed, written = frozenset(found.changed), frozenset(_written_by_modes(captured))
    return Observation(effects, changed, written, evaluation, found.counts)


def _refuse_failing(captured: CollabGraphModule, values: Sequence[Any], run: _Run) -> None:
    """Raise if the model works where its graph fails: what calls are handed was not all seen while it was traced."""
    assert run.error is not None and run.failed is not None
    if isinstance(run.error, FxCollabError):
        raise run.error
    failures = failures_on(captured.root, captured.meta[CAPTURE_KEY].interface, values)
    if all(failures):
        raise next(filter(None, failures))
    if any(failures) or not has_values(captured):  # it is for one mode alone, or fake tensors can't do it
        return
    hooked = [path for path in hooked_modules(captured.root) if path]
    hooks = f"; hooks of {', '.join(hooked[:4])} don't run while a forward is traced" if hooked else ""
    raise ForwardError(
        f"The graph of {type(captured.root).__qualname__} fails on the example inputs, on which the model works.",
        where=place(run.failed),
        why=f"{one_line(run.error)}{hooks}",
        hint="put the splits at modules further out, so that the code around this call stays inside a leaf module",
    ) from run.error


def _written_by_modes(captured: CollabGraphModule) -> Iterator[str]:
    """State that ``train()`` of opened modules writes; that of others is called in each branch."""
    nodes = [node for graph in captured.modes for node in graph.nodes if node.op in ("call_module", "get_attr")]
    whole = {str(n.target) for n in nodes if isinstance(attribute(captured, str(n.target)), nn.Module)}
    opened = map(captured.root.get_submodule, ["", *opened_around(whole)])
    if all(getattr(module.train, "__func__", None) is nn.Module.train for module in opened):
        return
    twin, operations = twin_of(captured.root), Operations()
    for path in whole:
        vars(twin.model.get_submodule(path))["train"] = lambda mode=True: None
    before = {name: (tensor, storage_id(tensor)) for name, tensor in named_tensors(twin.model)}
    with twin.running(), operations.watched():
        for training in (True, False, True):
            set_mode(twin.model, training)
    now = dict(named_tensors(twin.model))
    yield from (name for name, (t, key) in before.items() if now.get(name) is not t or key in operations.written)


def _everything(node: fx.Node) -> Effects:
    inputs = frozenset(node.all_input_nodes)
    return Effects(inputs, inputs, random=True, certain=False) if node.op.startswith("call") else Effects()


def _examples(captured: CollabGraphModule) -> Iterator[Sequence[Any]]:
    """Values of the inputs to try: those given, random ones of the shapes that are known, or of usual ones."""
    options: CaptureOptions = captured.meta[CAPTURE_KEY]
    interface = options.interface
    if options.example_inputs is not None:
        yield interface.values_of(captured.root, options.example_inputs)
    elif interface.known:
        yield example_tensors(captured.root, interface)
    elif not interface.structured:
        yield from (example_tensors(captured.root, guess) for guess in guesses(captured.root, interface))


def _observe(captured: CollabGraphModule, examples: Sequence[Sequence[Any]], *, real: bool) -> _Run:
    """All runs on one twin; the examples are the first on which the graph of train mode runs."""
    tried = []
    for values in examples or [()]:
        run = _Run(captured, twin_of(captured.root, real=real))
        run.run(True, values)
        if run.error is None or run.depends_on_data:
            break
        tried.append(run)
    else:
        run = max(tried, key=lambda run: len(run.effects))
    if not run.run(False, _other_batch(values)):
        run.run(False, values)
    run.twin.forget()
    return run


def _has_no_strides(tensor: Tensor) -> bool:
    """Whether it is sparse or nested, of which there are no fake ones."""
    return tensor.is_nested or tensor.layout is not torch.strided


def _other_batch(values: Sequence[Any]) -> Sequence[Any]:
    """The values with one sample more."""
    tensors = [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor) and leaf.ndim]
    size = 0 if any(map(_has_no_strides, tensors)) or not tensors else tensors[0].shape[0]

    def longer(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[:1]]) if tensor.ndim and 0 < size == tensor.shape[0] else tensor

    found: list[Any] = pytree.tree_map_only(Tensor, longer, list(values))
    return found


class _Run:
    """Runs of a captured model's graphs on one twin of its root.

    ``effects`` are those of all runs so far, ``evaluation`` those of the last in eval mode; ``error`` is what ended
    the first one, at the node ``failed``.
    """

    def __init__(self, captured: CollabGraphModule, twin: Twin) -> None:
        self._captured, self.twin = captured, twin
        self.effects: dict[fx.Node, Effects] = {}
        self.evaluation: dict[fx.Node, Effects] = {}
        self.changed: set[str] = set()
        self.counts = False
        self.error: Exception | None = None
        self.failed: fx.Node | None = None
        self._copies: dict[str, tuple[set[int], set[int]]] = {}  # what copies of modules read, once for each
        self._names = {id(tensor): name for name, tensor in reversed(list(named_tensors(captured.root)))}
        self._interface: Interface = captured.meta[CAPTURE_KEY].interface

    @property
    def depends_on_data(self) -> bool:
        """Whether the first run ended where values are needed that fake tensors don't have."""
        return isinstance(self.error, DATA_DEPENDENT_ERRORS)

    def run(self, training: bool, values: Sequence[Any]) -> bool:
        """Run the graph of one mode. Returns whether all nodes ran."""
        graph, twin = self._captured.modes.of(training), self.twin
        with twin.running(), torch.set_grad_enabled(training):
            set_mode(twin.model, training)
            reads = _reads_attributes(graph, self._captured)
            guarded = not training and any(node.target is guard for node in graph.nodes)
            before = Attributes(twin.model, dict(twin.model.named_modules()) if reads or guarded else ())
            inputs = _placeholder_values(
                graph, self._interface, pytree.tree_map_only(Tensor, twin.stand_in, list(values))
            )
            observer = Observer(self._captured, graph, twin, self._names, self._copies)
            observer.run(*inputs, enable_io_processing=False)
            if not self.effects:
                self.error, self.failed = observer.error, observer.failed
            changed = before.changed()
            self.changed.update(changed if reads else ())
            self.counts |= guarded and bool(changed)
        if not training:
            self.evaluation = observer.effects
        for node, effects in observer.effects.items():
            self.effects[node] = self.effects[node] | effects if node in self.effects else effects
        return observer.error is None


def _placeholder_values(graph: fx.Graph, interface: Interface, values: Sequence[Any]) -> Sequence[Any]:
    """The values of a graph's placeholders: the leaves of structured inputs, fixed ones, and defaults."""
    if isinstance(codegen := codegen_of(graph), PyTreeCodeGen) and values:
        return list(codegen.process_inputs(*values))
    named = dict(zip((spec.name for spec in interface.inputs), values, strict=False)) | dict(interface.fixed)
    placeholders = graph.find_nodes(op="placeholder")
    return [named.get(str(node.target), node.args[0] if node.args else Unknown()) for node in placeholders]


def _reads_attributes(graph: fx.Graph, captured: CollabGraphModule) -> bool:
    """Whether the graph reads tensors that are not registered."""
    registered = dict(named_tensors(captured))
    return any(node.target not in registered for node in graph.find_nodes(op="get_attr"))
