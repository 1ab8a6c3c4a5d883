"""What a training model returns in eval mode: head 0's output, the mean over heads, or all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcollab._torch import codegen_of, pytree
from fxcollab.errors import StateError
from fxcollab.fx_utils import copy_graph, get_output
from fxcollab.rewriting.outputs import EvalOutput, codegen_for_eval, codegen_for_one, is_flat, output_of
from fxcollab.rewriting.prune import prune_graph
from fxcollab.tree import HeadTree


def eval_graph(graph: fx.Graph, tree: HeadTree, peers: str, eval_output: EvalOutput) -> fx.Graph:
    """The graph that eval mode runs, made of its training graph.

    Of head 0 it is the inference graph. The mean is that of all floating-point tensors in the heads' outputs.
    """
    new = prune_graph(graph, tree, (0,) * tree.depth, peers) if eval_output == "head" else mean_graph(graph, tree)
    new.set_codegen(codegen_for_eval(codegen_of(new)))
    return new


def mean_graph(graph: fx.Graph, tree: HeadTree) -> fx.Graph:
    """A graph that returns the mean over heads, made of a training graph."""
    new = copy_graph(graph)
    output, paths = get_output(new), list(tree.paths(tree.depth))
    heads = [output_of(new, tree, path) for path in paths]
    with new.inserting_before(output):
        if is_flat(codegen_of(new)):
            each = zip(*heads, strict=True)
            mean: Any = type(heads[0])(new.call_function(mean_of_heads, (tuple(leaves),)) for leaves in each)
        else:
            mean = new.call_function(mean_of_heads, (tuple(heads),))
    output.args = (mean,)
    new.set_codegen(codegen_for_one(codegen_of(new)))
    return new


def mean_of_heads(outputs: Sequence[Any]) -> Any:
    """The mean of several outputs of one structure, tensor by tensor; other values are head 0's.

    Raises:
        StateError: they are objects that are neither a structure of torch's ``pytree`` nor a dataclass.
    """
    return pytree.tree_map(_mean, *outputs)


def _mean(*leaves: Any) -> Any:
    first = leaves[0]
    if isinstance(first, Tensor):
        return torch.stack(leaves).mean(0) if first.is_floating_point() or first.is_complex() else first
    if first is None or isinstance(first, int | float | str | bool):
        return first
    if is_dataclass(first) and not isinstance(first, type):
        mean: Any = copy.copy(first)
        for field in fields(first):  # past ``__setattr__``, which a frozen one refuses
            object.__setattr__(mean, field.name, mean_of_heads([getattr(leaf, field.name) for leaf in leaves]))
        return mean
    raise StateError(
        f"Outputs of type {type(first).__qualname__} have no mean.",
        why="only tensors, and structures of them that torch knows, and dataclasses, can be averaged",
        hint="use eval_output='head', or average what fxcollab.all_heads(train_model)(x) returns",
    )
