"""The outputs of graphs: of one head, and of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import fx
from torch.fx.graph import CodeGen

from fxcollab._torch import EvalOutputCodeGen, PyTreeCodeGen, codegen_of, pytree
from fxcollab.errors import PatternError
from fxcollab.fx_utils import get_output
from fxcollab.tree import HeadTree, Path

EvalOutput: TypeAlias = Literal["head", "all", "mean"]


def check_eval_output(eval_output: str) -> None:
    """Raise a PatternError unless it is one of the three."""
    if eval_output not in ("head", "all", "mean"):
        raise PatternError(
            f"{eval_output!r} is not a value of eval_output.",
            hint="use 'head' (head 0's output, as the original's), 'all' (the tuple) or 'mean' (--eval-output mean)",
        )


def output_of(graph: fx.Graph, tree: HeadTree, path: Path) -> Any:
    """What one head contributes to the training graph's output."""
    outputs: Any = get_output(graph).args[0]
    head = list(tree.paths(tree.depth)).index(path)
    if not is_flat(codegen_of(graph)):
        return outputs[head]
    size = len(outputs) // tree.heads
    return type(outputs)(outputs[head * size : (head + 1) * size])


def is_flat(codegen: CodeGen) -> bool:
    """Whether a graph returns the leaves of its outputs, from which a pytree spec makes the outputs."""
    return isinstance(codegen, PyTreeCodeGen) and codegen.pytree_info.out_spec is not None


def codegen_for_heads(codegen: CodeGen, heads: int) -> CodeGen:
    """Code generation for a graph that returns one output a head."""
    return _of_outputs(codegen, lambda one: (one,) * heads)


def codegen_for_one(codegen: CodeGen) -> CodeGen:
    """Code generation for a graph that returns what one head does."""
    return _of_outputs(codegen, lambda heads: heads[0])


def codegen_for_eval(codegen: CodeGen) -> CodeGen:
    """The same for a graph that only eval mode of a training model runs."""
    return EvalOutputCodeGen(codegen.pytree_info) if isinstance(codegen, PyTreeCodeGen) else codegen


def _of_outputs(codegen: CodeGen, change: Callable[[Any], Any]) -> CodeGen:
    """Code generation for outputs of the structure that ``change`` returns."""
    if not isinstance(codegen, PyTreeCodeGen) or not is_flat(codegen):
        return codegen
    spec: Any = codegen.pytree_info.out_spec
    outputs = change(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    return PyTreeCodeGen(codegen.pytree_info._replace(out_spec=pytree.tree_flatten(outputs)[1]))
