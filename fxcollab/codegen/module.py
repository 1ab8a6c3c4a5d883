"""Graphs become a module: one readable ``forward`` over the caller's own modules, parameters and buffers.

``fx.GraphModule`` alone rebuilds the module hierarchy from what the nodes use: it drops unused modules and
aliases, orders the state by first use, and replaces parents by bare modules. `CollabGraphModule` has the root's own
children and state instead, so that its state dict begins with exactly the root's.

Where a forward depends on ``self.training`` there are two graphs, one for each mode; the generated forward branches
on ``self.training``, and the ``graph`` attribute is that of the current mode. A training model's ``modes`` are the
graphs of all heads; in eval mode its forward runs, and ``graph`` is, a graph made of them that has one output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from fxcollab._torch import GENERATED, codegen_of
from fxcollab.codegen.attributes import adopt_methods, check_state_dict, plain_attributes
from fxcollab.codegen.branches import Recompute, branch_by_branch, module_by_module
from fxcollab.codegen.fixed import Fixed, with_check
from fxcollab.codegen.forwards import Forward, code_of_modes, forward_of_modes
from fxcollab.codegen.modes import Modes, in_mode, set_mode
from fxcollab.codegen.packing import pack, unpack
from fxcollab.errors import GuardError, StateError
from fxcollab.functional import shallow
from fxcollab.fx_utils import OWN, Target, copy_graph, first_difference, get_output, make_printable
from fxcollab.rewriting.state_dict import refuse_other_checkpoint

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_REGISTRIES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
OtherInputs = Callable[["CollabGraphModule", Sequence[Any], GuardError], Any]


class CollabGraphModule(fx.GraphModule):
    """A ``GraphModule`` over the modules and the state of ``root``, which it shares and never copies.

    Args:
        root: the module whose children, parameters and buffers the graphs refer to.
        modes: the graphs.
        constants: tensors that the graphs refer to by name and that are neither parameters nor buffers.
        fixed: what the graphs have the values of; a call raises where it is another.
        peers: modules added after the root's own, under these names.
        recompute: ``heads`` to compute each branch again in the backward pass (see `branches`).
        eval_graph: makes the graph that eval mode runs of the graph of all heads; by default it runs that.
        other_inputs: computes the output of eval mode where a guard of the graph raises, of the module, the values of
            the inputs and the error.
        generate: whether to generate the forward now; else by ``recompile()``.
    """

    # What ``torch.jit.script`` leaves out.
    __jit_unused_properties__ = [  # noqa: RUF012
        *fx.GraphModule.__jit_unused_properties__,
        "modes", "root", "constants", "fixed", "name_of_peers", "recompute",
    ]  # fmt: skip
    _graph_of_eval: fx.Graph | None = None
    _eval_out_spec: Any = None
    _recomputed_modules: frozenset[str] = frozenset()
    returns_all = False
    """Whether eval mode returns what train mode does: one output a head. See `all_heads`."""
    is_part = False
    """Whether it is the part of a training model that a rank has. See `spread`."""

    def __init__(
        self,
        root: nn.Module,
        modes: Modes,
        *,
        constants: Mapping[str, torch.Tensor] | None = None,
        fixed: Fixed | None = None,
        peers: Mapping[str, nn.Module] | None = None,
        recompute: Recompute | None = None,
        eval_graph: Callable[[fx.Graph], fx.Graph] | None = None,
        other_inputs: OtherInputs | None = None,
        generate: bool = True,
    ) -> None:
        check_state_dict(root)
        super().__init__(nn.Module(), fx.Graph(), class_name=type(root).__name__)
        # The same dictionaries, not copies: .to(), .double() and load_state_dict(assign=True) replace their entries,
        # and state would no longer be shared with the root.
        shared = (*_REGISTRIES, *(name for name in _STATE_HOOKS if name in root.__dict__))
        self.__dict__.update({name: root.__dict__[name] for name in shared})
        self.__dict__.update(
            _modules={**root._modules, **(peers or {})},
            _root=root,
            _modes=modes,
            _peers=tuple(peers or ()),
            _constants=tuple(constants or ()),
            _fixed=fixed or Fixed(),
            _recompute=recompute,
            _eval_graph=eval_graph,
            _other_inputs=other_inputs,
        )
        self.__dict__[OWN] = own = nn.Module()
        own.__dict__.update({name: self.__dict__[name] for name in _REGISTRIES})
        for name, value in (*plain_attributes(root, modes), *(constants or {}).items()):
            (own if name in self.__dict__ or hasattr(type(self), name) else self).__dict__[name] = value
        self.__dict__["_names"] = {*self.__dict__, "_names", *_GENERATED, *dir(CollabGraphModule)}
        adopt_methods(self)
        self.training = root.training
        self._graph = modes.of(self.training)
        for graph in modes:
            graph.owning_module = self
            make_printable(graph, self._is_hidden)
        if generate:
            self.recompile()

    def _is_hidden(self, name: str) -> bool:
        """Whether an attribute of this class hides a module or tensor of the root."""
        return hasattr(type(self), name) or (name in self.__dict__ and hasattr(self.__dict__[OWN], name))

    def __setattr__(self, name: str, value: Any) -> None:
        """As in ``nn.Module``; what this class hides is set apart from its own attributes."""
        if OWN not in self.__dict__ or not self._is_hidden(name):
            super().__setattr__(name, value)
        elif isinstance(value, nn.Module | torch.Tensor):
            setattr(self.__dict__[OWN], name, value)
        else:
            object.__setattr__(self, name, value)

    def get_submodule(self, target: str) -> nn.Module:
        """The module at a path; as in ``nn.Module``, but attributes of this class hide none."""
        return super().get_submodule(Target(target, own=bool(target)))

    @property
    def modes(self) -> Modes:
        """The graphs of train and eval mode."""
        modes: Modes = self.__dict__["_modes"]
        return modes

    @property
    def root(self) -> nn.Module:
        """The module whose children and state this one has."""
        root = self.__dict__["_root"]
        assert isinstance(root, nn.Module)
        return root

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the tensors that the graphs refer to and that are neither parameters nor buffers."""
        names: tuple[str, ...] = self.__dict__["_constants"]
        return names

    @property
    def fixed(self) -> Fixed:
        """What the graphs have the values of."""
        fixed: Fixed = self.__dict__.get("_fixed") or Fixed()
        return fixed

    @property
    def name_of_peers(self) -> str:
        """The name of the module that has the peers; empty where there are none."""
        names: tuple[str, ...] = self.__dict__["_peers"]
        return next(iter(names), "")

    @property
    def recompute(self) -> Recompute | None:
        """What is computed again in the backward pass; None for nothing."""
        recompute: Recompute | None = self.__dict__["_recompute"]
        return recompute

    def accept(self, written: Collection[tuple[nn.Module, str]]) -> None:
        """Take the values that these attributes of modules have now for those of the graphs."""
        self.__dict__["_fixed"] = self.fixed.now(self.root, written)
        self.recompile()

    def recompute_modules(self, modules: frozenset[str]) -> None:
        """Compute the calls of these modules, and of no others, again in the backward pass."""
        if modules != self._recomputed_modules:
            self._recomputed_modules = modules
            self.recompile()

    @property
    def graph(self) -> fx.Graph:
        """The graph that runs in the current mode. Assigning another replaces it in the modes that share it."""
        return self.modes.of(self.training) if self.returns_all else self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if self._graph_of_eval is not None and self._graph_of_eval is self._graph and graph is not self._graph:
            raise _made_of_the_training_graph(self._graph)
        if "_modes" in self.__dict__ and graph not in tuple(self.modes):
            old, modes = self._graph, self.modes
            self.__dict__["_modes"] = Modes(*(graph if g is old else g for g in (modes.train, modes.eval)))
        graph.owning_module = self
        self._graph = graph
        self.recompile()

    def recompile(self) -> PythonCode:
        """Generate the forward again after the graph was edited in place."""
        if "_modes" not in self.__dict__:
            return self._generate(self._graph)
        self._make_graph_of_eval()
        one, modes = self._graph_of_eval, self.modes
        graphs = {"self.training": modes.train, "self.returns_all": modes.eval, "True": one}
        if one is None:
            graphs = {"self.training": modes.train, "True": modes.eval}
        elif not modes.differ:
            graphs = {"self.training or self.returns_all": modes.train, "True": one}
        other, several = self.__dict__.get("_other_inputs"), one is not None or modes.differ
        forwards = [*starmap(self._compiled, graphs.items())] if several or other is not None else []
        if other is not None:
            forwards[-1] = forwards[-1]._replace(function=_with_other_inputs(forwards[-1].function, other))
        result = self._generate(modes.of(self.training))
        self._graph = self._graph_now()
        if forwards:
            type(self).forward = forward_of_modes(forwards)
            self._code = code_of_modes(forwards) if several else self._code
        if self.fixed != Fixed():
            cls: Any = type(self)
            cls.__call__ = with_check(cls.__call__, self.root, self.fixed, self.__dict__["_names"])
        return result

    def own_root(self) -> nn.Module:
        """The root; a copy of it where children of this module were replaced, as by SyncBatchNorm."""
        own = {name: child for name, child in self._modules.items() if name not in self.__dict__["_peers"]}
        if all(self.root._modules.get(name) is child for name, child in own.items()):
            return self.root
        root = shallow(self.root)
        root.__dict__["_modules"] = own
        return root

    def _make_graph_of_eval(self) -> None:
        """Make the graph that eval mode runs of the training graph, as that is now."""
        one, made, make = self._graph_of_eval, self.__dict__.get("_made"), self.__dict__.get("_eval_graph")
        if one is not None and made is not None and first_difference(one, made) is not None:
            raise _made_of_the_training_graph(one)
        if make is not None:
            try:
                self._graph_of_eval = one = make(self.modes.eval)
            except StateError as error:
                error.hint = f"{error.hint}; with eval_output='all' eval mode needs no graph of one head"
                raise
            one.owning_module = self
            self._eval_out_spec = getattr(codegen_of(one), "pytree_info", (None,) * 3)[-1]
            self.__dict__["_made"] = copy_graph(one)

    def _compiled(self, condition: str, graph: fx.Graph) -> Forward:
        self._generate(graph)
        return Forward(condition, type(self).forward, self._code)

    def _generate(self, graph: fx.Graph) -> PythonCode:
        """Generate the forward of one graph, with branches as functions where they are computed again."""
        make_printable(graph, self._is_hidden)
        active = self._graph
        if graph is not self._graph_of_eval and self._recomputed_modules:
            graph = module_by_module(graph, self._recomputed_modules)
        if graph is not self._graph_of_eval and self.__dict__.get("_recompute"):
            graph = branch_by_branch(graph, self, self.__dict__["_peers"][0])
        self._graph = graph
        try:
            return super().recompile()
        finally:
            self._graph = active

    def train(self, mode: bool = True) -> CollabGraphModule:
        """Set the mode of all modules the way the root does; peers follow the modules they stem from."""
        set_mode(self.root, mode)
        for name, child in self._modules.items():
            if child is not None and child is not self.root._modules.get(name):
                child.train(mode)  # peers, and modules that replaced a child
        for name in self.__dict__["_peers"]:
            _follow_modes(self._modules[name], dict(self.named_modules(remove_duplicate=False)))
        self.training = self.root.training
        self._graph = self._graph_now()
        return self

    def _graph_now(self) -> fx.Graph:
        """The graph that the forward runs in the current mode."""
        one = None if self.training else self._graph_of_eval
        return self.modes.of(self.training) if one is None else one

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in ``nn.Module``; a checkpoint of a single network, or of another head tree, is told as such.

        Raises:
            StateError: if ``strict``, for such a checkpoint.
        """
        if strict and (peers := self.__dict__["_peers"]) and not self.is_part:
            refuse_other_checkpoint(state_dict, self.state_dict(), peers[0])
        return super().load_state_dict(state_dict, strict, assign)

    @contextmanager
    def in_mode(self, training: bool) -> Iterator[None]:
        """A context in which the module is in a mode; every module's mode is restored afterwards."""
        with in_mode(self.root, training), in_mode(self, training):
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> CollabGraphModule:
        """A copy with its state, names, graphs and provenance, which shares nothing with this one."""
        memo[id(self)] = new = CollabGraphModule.__new__(CollabGraphModule)
        state = {k: v for k, v in self.__dict__.items() if k not in _GENERATED - {"_modes"}}
        return _restore(new, copy.deepcopy(state, memo))

    def __copy__(self) -> CollabGraphModule:
        """A module over the same state with graphs of its own."""
        new = CollabGraphModule.__new__(CollabGraphModule)
        return _restore(new, self.__dict__ | {"_modes": self.modes.map(copy_graph)})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph, not code that is traced again, which would change in-place operations."""
        state = {k: v for k, v in self.__dict__.items() if k not in _GENERATED}
        graphs = [pack(graph) for graph in self.modes]
        return _unpickle, (state, graphs)


_GENERATED = GENERATED | {"_modes", "_graph_of_eval", "_made"}


def _restore(new: CollabGraphModule, state: dict[str, Any]) -> CollabGraphModule:
    new.__dict__.update(dict.fromkeys(GENERATED) | state)
    new.__class__.__name__ = type(new.root).__name__
    adopt_methods(new)
    for graph in new.modes:
        graph.owning_module = new
    new.__dict__["_graph"] = new.modes.of(new.training)
    new.recompile()
    return new


def _with_other_inputs(forward: Callable[..., Any], other: OtherInputs) -> Callable[..., Any]:
    """A forward of eval mode that takes inputs for which a guard raises, too."""

    def run(module: CollabGraphModule, *values: Any) -> Any:
        try:
            return forward(module, *values)
        except GuardError as error:
            return other(module, values, error)

    return run


def _made_of_the_training_graph(graph: fx.Graph) -> StateError:
    return StateError(
        "The graph that a training model runs in eval mode can't be edited.",
        where=f"the graph that ends in {get_output(graph).format_node()}",
        why="it is made of the graph of all heads, and the edit would not be in that",
        hint="edit that of all heads: train_model.train().graph, or train_model.modes.eval where the modes differ",
    )


def _follow_modes(peers: nn.Module | None, origins: Mapping[str, nn.Module]) -> None:
    for branch in peers.children() if peers is not None else ():
        for name, module in branch.named_modules():
            if name in origins and type(module) is type(origins[name]):
                module.training = origins[name].training


def _unpickle(state: dict[str, Any], graphs: list[dict[str, Any]]) -> CollabGraphModule:
    unpacked = [unpack(graph) for graph in graphs]
    new = CollabGraphModule.__new__(CollabGraphModule)
    return _restore(new, state | {"_modes": Modes(unpacked[0], unpacked[-1])})
