"""The observer: runs a graph node by node on a twin, and notes what every node does."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import pytree, storage_id
from fxcollab.analysis.effects import Effects
from fxcollab.analysis.operations import Operations
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.deep_copy import clone_of, deep_copy_into, parts_of_value
from fxcollab.functional import call_with, named_tensors, parameter_names
from fxcollab.fx_utils import Interpreter, attribute, opened_around
from fxcollab.rng import ForeignState
from fxcollab.runtime.operators import GradientMethod, guard
from fxcollab.runtime.tensors import CARRIES_NO_GRADIENT
from fxcollab.tracing.helpers import is_helper
from fxcollab.tracing.twin import Twin, same_members


class Unknown:
    """The value of a node that could not be run."""


class Observer(Interpreter):
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
        self.failed: fx.Node | None = None

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
        if not isinstance(value, Unknown):
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
        if any(isinstance(self.env[source], Unknown) for source in inputs):
            return Unknown()
        generators, buffers = ForeignState(), self._buffers_of(node)
        self._operations.start()
        try:
            with self._operations.watched():
                value = super().run_node(node)
        except Exception as error:  # user code may raise anything
            if self.error is None:
                self.error, self.failed = error, node
            return Unknown()
        changed = {id(part) for part, old in self._given if not same_members(part, old)}
        assigned = set[int]()  # buffers that have others in their place, and are not written
        for registry, before in buffers:
            assigned |= {storage_id(buffer) for name, buffer in before.items() if registry.get(name) is not buffer}
            registry.update(before)
        effects = self._effects(node, value, changed, assigned, generators.foreign_numbers_were_drawn())
        if is_helper(node.target):
            asked = frozenset(source for source in inputs if self._keys[source])
            effects = replace(effects, asked=asked)
        self.effects[node] = effects
        return value

    def _buffers_of(self, node: fx.Node) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """The registries of a called module, with the buffers in each."""
        parts = self._twin.model.get_submodule(str(node.target)).modules() if node.op == "call_module" else ()
        registries = (part._buffers for part in parts if not isinstance(part, torch.jit.ScriptModule))
        return [(one, {name: buffer for name, buffer in one.items() if buffer is not None}) for one in registries]

    def _effects(self, node: fx.Node, value: Any, changed: set[int], assigned: set[int], drew: bool) -> Effects:
        seen = self._operations
        written = seen.classes(seen.written)
        if isinstance(node.target, GradientMethod):  # it changes how a tensor's gradient is computed
            written |= seen.classes(self._keys[node.all_input_nodes[0]])
        returned = seen.classes(storage_id(part) if isinstance(part, Tensor) else id(part) for part in _parts(value))
        of_inputs = {source: seen.classes(self._keys[source]) for source in node.all_input_nodes}
        return Effects(
            frozenset(source for source, keys in of_inputs.items() if keys & (written | changed)),
            frozenset(source for source, keys in of_inputs.items() if keys & returned),
            frozenset(),
            frozenset(self._reads(node)),
            frozenset(self._names[key] for key in (seen.written | assigned) & self._names.keys()),
            seen.random or drew,
            bool(changed.difference(*of_inputs.values())),
            seen.flops,
            self._is_plain(node, value),
        )

    def _is_plain(self, node: fx.Node, value: Any) -> bool:
        """Whether torch or Python computes something else than tensors of tensors; a module may return one later."""
        sources = node.all_input_nodes
        known = all(isinstance(self.env[source], Tensor) or self.effects[source].plain for source in sources)
        of_torch = known and node.op != "call_module" and not is_helper(node.target)
        return of_torch and all(isinstance(part, (tuple, *CARRIES_NO_GRADIENT)) for part in parts_of_value(value))

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
        others = {name: clone_of(made.get_parameter(name)) for name in parameter_names(made)}
        # What it reads of an argument, it doesn't read by itself.
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, self.fetch_args_kwargs_from_env(node))
        operations = Operations()
        with operations.watched():
            call_with(made, others, args, kwargs)
        return {storage_id(tensor) for tensor, new in tensors if storage_id(new) in operations.read}, operations.read


def _parts(value: Any) -> Iterator[Any]:
    """The tensors in a value, and the lists, dicts and attributes of objects that can be changed."""
    return (part for part in parts_of_value(value) if isinstance(part, Tensor | list | dict | set))
