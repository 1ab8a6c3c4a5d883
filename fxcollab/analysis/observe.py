"""Observe: what each node of a captured graph does, seen while the graph runs on a twin.

The graph runs node by node on fake tensors, in both modes and with two batch sizes; one that depends on the values of
its inputs runs on a copy of the model with real ones. Modes of torch see every operation: what it writes, which
storage its results share, which of the model's tensors it reads, and whether it draws random numbers. A node that
can't be run is taken to do all of it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import DATA_DEPENDENT_ERRORS, PyTreeCodeGen, codegen_of, pytree, storage_id
from fxcollab.analysis.operations import Operations
from fxcollab.codegen.modes import set_mode
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.deep_copy import clone_of, deep_copy_into, parts_of_value
from fxcollab.functional import call_with, named_tensors
from fxcollab.fx_utils import Interpreter, attribute, opened_around
from fxcollab.rng import ForeignState
from fxcollab.runtime.operators import GradientMethod, guard
from fxcollab.tracing.capture import CAPTURE_KEY, CaptureOptions
from fxcollab.tracing.examples import example_tensors, guesses
from fxcollab.tracing.helpers import is_helper
from fxcollab.tracing.interface import Interface
from fxcollab.tracing.leaks import purge_leaked_tensors
from fxcollab.tracing.twin import Attributes, Twin, same_members, twin_of


@dataclass(frozen=True)
class Effects:
    """What one node does.

    Attributes:
        writes: inputs whose storage is written, or whose lists and dicts are changed.
        shares: inputs whose storage the result may share.
        reads: names of the model's tensors that are read without being inputs or registered in the module that is
            called, each with whether a copy of that module reads a copy of it. Those registered there are among them
            if a copy wouldn't, or if other nodes read them too and the module would not read another tensor that
            was registered in the place of it.
        changes: names of the model's tensors that are written, however they are reached.
        random: whether random numbers are drawn.
        literals: whether a list or dict is changed that stands in the graph, and is made anew for every call.
        certain: False where the node could not be run.
    """

    writes: frozenset[fx.Node] = frozenset()
    shares: frozenset[fx.Node] = frozenset()
    reads: frozenset[tuple[str, bool]] = frozenset()
    changes: frozenset[str] = frozenset()
    random: bool = False
    literals: bool = False
    certain: bool = True

    def __or__(self, other: Effects) -> Effects:
        """What either does."""
        return Effects(
            self.writes | other.writes,
            self.shares | other.shares,
            self.reads | other.reads,
            self.changes | other.changes,
            self.random or other.random,
            self.literals or other.literals,
            self.certain and other.certain,
        )


@dataclass(frozen=True, eq=False)
class Observation:
    """The effects of all nodes of a captured model.

    Attributes:
        effects: by node.
        changed: names of attributes that a call of the model changes, such as ``features``.
        written_by_modes: names of state that ``train()`` of opened modules writes.
    """

    effects: Mapping[fx.Node, Effects]
    changed: frozenset[str] = frozenset()
    written_by_modes: frozenset[str] = frozenset()

    def of(self, node: fx.Node) -> Effects:
        """What ``node`` does."""
        return self.effects[node]


@purge_leaked_tensors()
def observe(captured: CollabGraphModule) -> Observation:
    """Run the graphs of a captured model, and note what their nodes do; the model is not touched."""
    examples = list(_examples(captured))
    only_real = any(_has_no_strides(leaf) for leaf in pytree.tree_leaves(examples) if isinstance(leaf, Tensor))
    found = _observe(captured, examples, real=only_real)
    if found.depends_on_data and not only_real and not any(tensor.is_meta for _, tensor in named_tensors(captured)):
        found = _observe(captured, examples, real=True)
    effects = {node: found.effects.get(node) or _everything(node) for graph in captured.modes for node in graph.nodes}
    return Observation(effects, frozenset(found.changed), frozenset(_written_by_modes(captured)))


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
    options = captured.meta[CAPTURE_KEY]
    assert isinstance(options, CaptureOptions)
    interface: Interface = options.interface
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

    ``effects`` are those of all runs so far; ``error`` is what ended the first one.
    """

    def __init__(self, captured: CollabGraphModule, twin: Twin) -> None:
        self._captured, self.twin = captured, twin
        self.effects: dict[fx.Node, Effects] = {}
        self.changed: set[str] = set()
        self.error: Exception | None = None
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
            paths = dict(twin.model.named_modules()) if _reads_attributes(graph, self._captured) else ()
            before = Attributes(twin.model, paths)
            inputs = _placeholder_values(
                graph, self._interface, pytree.tree_map_only(Tensor, twin.stand_in, list(values))
            )
            observer = _Observer(self._captured, graph, twin, self._names, self._copies)
            observer.run(*inputs, enable_io_processing=False)
            if not self.effects:
                self.error = observer.error
            self.changed.update(before.changed())
        for node, effects in observer.effects.items():
            self.effects[node] = self.effects[node] | effects if node in self.effects else effects
        return observer.error is None


def _placeholder_values(graph: fx.Graph, interface: Interface, values: Sequence[Any]) -> Sequence[Any]:
    """The values of a graph's placeholders: the leaves of structured inputs, fixed ones, and defaults."""
    if isinstance(codegen := codegen_of(graph), PyTreeCodeGen) and values:
        return list(codegen.process_inputs(*values))
    named = dict(zip((spec.name for spec in interface.inputs), values, strict=False)) | dict(interface.fixed)
    placeholders = graph.find_nodes(op="placeholder")
    return [named.get(str(node.target), node.args[0] if node.args else _Unknown()) for node in placeholders]


def _reads_attributes(graph: fx.Graph, captured: CollabGraphModule) -> bool:
    """Whether the graph reads tensors that are not registered."""
    registered = dict(named_tensors(captured))
    return any(node.target not in registered for node in graph.find_nodes(op="get_attr"))


class _Unknown:
    """The value of a node that could not be run."""


class _Observer(Interpreter):
    """Runs a graph on a twin as far as it can be run, and notes the effects of every node that was."""

    def __init__(
        self,
        captured: CollabGraphModule,
        graph: fx.Graph,
        twin: Twin,
        names: Mapping[int, str],
        copies: dict[str, tuple[set[int], set[int]]],
    ) -> None:
        super().__init__(twin.model, graph)
        self._copies = copies
        self._captured, self._twin, self._operations = captured, twin, Operations()
        named = [(tensor, new, names[id(tensor)]) for tensor, new in twin.tensors if id(tensor) in names]
        self._names: dict[int, str] = {storage_id(new): name for _, new, name in named}
        # ``.data = `` would free them.
        self._storages = [
            new.untyped_storage() if new.layout is torch.strided else new.detach() for _, new in twin.tensors
        ]
        self._names_of_originals = {storage_id(tensor): name for tensor, _, name in named}
        self._keys: dict[fx.Node, set[int]] = {}
        self.effects: dict[fx.Node, Effects] = {}
        self.error: Exception | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and note what it does."""
        value: Any = None
        if n.op == "get_attr":
            value = attribute(self._captured, str(n.target))
            is_tensor = isinstance(value, Tensor)
            value = self._twin.stand_in(value) if is_tensor else attribute(self._twin.model, str(n.target))
        elif n.op == "placeholder":
            value = super().run_node(n)
        elif n.op != "output" and n.target is not guard:
            value = self._run_call(n)
        if not isinstance(value, _Unknown):
            self.effects.setdefault(n, Effects())
        self._keys[n] = {storage_id(part) if isinstance(part, Tensor) else id(part) for part in _parts(value)}
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """The arguments of a node; what lists and dicts in them hold is noted."""
        given = super().fetch_args_kwargs_from_env(n)
        self._given = [(part, copy.copy(part)) for part in _parts(given) if not isinstance(part, Tensor)]
        return given

    def _run_call(self, node: fx.Node) -> Any:
        inputs = node.all_input_nodes
        if any(isinstance(self.env[source], _Unknown) for source in inputs):
            return _Unknown()
        generators, buffers = ForeignState(), dict(self._buffers_of(node))
        self._operations.start()
        try:
            with self._operations.watched():
                value = super().run_node(node)
        except Exception as error:  # user code may raise anything
            self.error = self.error or error
            return _Unknown()
        if self._operations.opaque:
            return value
        changed = {id(part) for part, old in self._given if not same_members(part, old)}
        effects = self._effects(node, value, changed, generators.foreign_numbers_were_drawn())
        for (module, name), buffer in buffers.items():
            if module._buffers.get(name) is not buffer:  # assigned, and not written
                module._buffers[name] = buffer
                key = storage_id(buffer)
                effects = replace(
                    effects, changes=effects.changes | {self._names[key]} if key in self._names else effects.changes
                )
        if is_helper(node.target):  # which may do otherwise for other sizes, as it asks about them
            values = frozenset(source for source in inputs if self._keys[source])
            effects = replace(effects, writes=values, shares=values, certain=False)
        self.effects[node] = effects
        return value

    def _buffers_of(self, node: fx.Node) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
        if node.op == "call_module":
            for part in self._twin.model.get_submodule(str(node.target)).modules():
                if not isinstance(part, torch.jit.ScriptModule):
                    yield from (
                        ((part, name), buffer) for name, buffer in part._buffers.items() if buffer is not None
                    )

    def _effects(self, node: fx.Node, value: Any, changed: set[int], drew: bool) -> Effects:
        seen = self._operations
        written = seen.classes(seen.written)
        if isinstance(node.target, GradientMethod):  # it changes how a tensor's gradient is computed
            written |= seen.classes(self._keys[node.all_input_nodes[0]])
        returned = seen.classes(storage_id(part) if isinstance(part, Tensor) else id(part) for part in _parts(value))
        of_inputs = {source: seen.classes(self._keys[source]) for source in node.all_input_nodes}
        return Effects(
            frozenset(source for source, keys in of_inputs.items() if keys & (written | changed)),
            frozenset(source for source, keys in of_inputs.items() if keys & returned),
            frozenset(self._reads(node)),
            frozenset(self._names[key] for key in seen.written & self._names.keys()),
            seen.random or drew,
            bool(changed.difference(*of_inputs.values())),
        )

    def _reads(self, node: fx.Node) -> Iterator[tuple[str, bool]]:
        read = self._operations.read
        yield from ((self._names_of_originals[key], False) for key in read & self._names_of_originals.keys())
        if node.op != "call_module" and not is_helper(node.target):
            return  # torch's own, such as ``autograd.grad``, read what autograd's graph has saved
        values = [self.env[source] for source in node.all_input_nodes]
        modules = [value for value in values if isinstance(value, nn.Module)]
        if node.op == "call_module":
            modules.append(self._twin.model.get_submodule(str(node.target)))
        own = {storage_id(tensor) for module in modules for _, tensor in named_tensors(module)}
        given = set().union(*(self._keys[source] for source in node.all_input_nodes))
        foreign = (read & self._names.keys()) - own - given
        check = foreign or own & read & self._used_twice or any(map(self._refers_around, modules))
        if check and node.op == "call_module":
            if node.target not in self._copies:
                self._copies[str(node.target)] = self._read_by_copy(node)
            copied, itself = self._copies[str(node.target)]
            found = foreign | (own & (itself | (copied & self._used_twice)))
            yield from ((self._names[key], key not in itself) for key in found & self._names.keys())
        else:
            yield from ((self._names[key], False) for key in foreign)

    @cached_property
    def _used_twice(self) -> set[int]:
        """What several nodes read: a call may be given another tensor in the place of such a parameter."""
        count = Counter[int]()
        for node in self.graph.nodes:
            if node.op == "call_module":
                module = self._twin.model.get_submodule(str(node.target))
                count.update({storage_id(parameter) for parameter in module.parameters()})
            elif node.op == "get_attr" and isinstance(value := attribute(self._captured, str(node.target)), Tensor):
                count[storage_id(self._twin.stand_in(value))] += 1
        return {key for key in count.keys() & self._names.keys() if count[key] > 1}

    @cached_property
    def _opened(self) -> dict[int, nn.Module]:
        """The modules that are opened, by id; peers have no copies of them."""
        called = (str(node.target) for node in self.graph.nodes if node.op == "call_module")
        modules = dict(self._twin.model.named_modules(remove_duplicate=False))
        return {id(modules[path]): modules[path] for path in ("", *opened_around(called))}

    def _refers_around(self, module: nn.Module) -> bool:
        held = (value for part in module.modules() for value in vars(part).values())
        return any(id(part) in self._opened for value in held for part in parts_of_value(value))

    def _read_by_copy(self, node: fx.Node) -> tuple[set[int], set[int]]:
        """What a copy of the called module reads, made as those for peers are, with others as its parameters.

        Returns keys of those of which it reads its copy, and of those that it reads themselves.
        """
        made, tensors = deep_copy_into(dict(self._opened), self._twin.model.get_submodule(str(node.target)), clone_of)
        others = {name: clone_of(parameter) for name, parameter in made.named_parameters()}
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        operations = Operations()
        with operations.watched():
            call_with(made, others, args, kwargs)
        return {storage_id(tensor) for tensor, new in tensors if storage_id(new) in operations.read}, operations.read


def _parts(value: Any) -> Iterator[Any]:
    """The tensors in a value, and the lists, dicts and attributes of objects that can be changed."""
    return (part for part in parts_of_value(value) if isinstance(part, Tensor | list | dict | set))
