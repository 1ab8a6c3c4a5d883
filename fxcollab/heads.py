"""The outputs of all heads in either mode, their ensemble, and the original behind a training model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxcollab.arguments import checked
from fxcollab.codegen.modes import in_mode
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import StateError
from fxcollab.plan import plan_of, training_model, unwrapped
from fxcollab.rewriting.eval_output import mean_graph, mean_of_heads
from fxcollab.rewriting.prune import with_own_modules


@checked
def all_heads(train_model: nn.Module) -> Callable[..., tuple[Any, ...]]:
    """A training model whose every call returns the tuple with one output a head, head 0 first.

    In train mode that is what the training model itself returns; in eval mode it returns head 0's output alone. The
    call sets a mark on the training model: don't use that in another thread meanwhile.

    Args:
        train_model: what `transform` or `load` returned, or a wrapper around it: DDP's, ``torch.compile``'s, one of
            Lightning. The call goes through the wrapper.

    Raises:
        StateError: it is not a training model.
    """
    inner = unwrapped(train_model)

    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        before = inner.returns_all
        inner.returns_all = True
        try:
            outputs: tuple[Any, ...] = train_model(*args, **kwargs)
            return outputs
        finally:
            inner.returns_all = before

    return call


@checked
def ensemble(train_model: nn.Module) -> CollabGraphModule:
    """A module that returns the mean of the heads' outputs, in either mode.

    Args:
        train_model: what `transform` or `load` returned, or a wrapper around it.

    Returns:
        A ``GraphModule`` over the training model's own tensors, with modules of its own, as `prune` returns. Of
        structured outputs all floating-point tensors are averaged, and head 0's other values returned; that of an
        output that torch can't take apart raises a StateError at the call.
    """
    model = training_model(train_model)
    tree, peers = plan_of(model).tree, plan_of(model).options.peers
    own = with_own_modules(nn.ModuleList([model.own_root(), model.get_submodule(peers)]))
    return CollabGraphModule(
        own.get_submodule("0"),
        model.modes.map(lambda graph: mean_graph(graph, tree)),
        constants={name: getattr(model, name) for name in model.constants},
        fixed=model.fixed,
        peers={peers: own.get_submodule("1")},
    )


class Evaluation(NamedTuple):
    """The means of a metric over a data set.

    Attributes:
        heads: of every head, head 0 first; of shape (H, ...) where the metric gives (N, ...).
        ensemble: of the mean of the heads' outputs; a scalar where the metric gives (N,).
    """

    heads: Tensor
    ensemble: Tensor


@checked
@torch.no_grad()
def evaluate_heads(
    train_model: nn.Module, batches: Iterable[tuple[Any, Any]], metric: Callable[[Any, Any], Tensor]
) -> Evaluation:
    """Evaluate every head and their ensemble in eval mode, in one pass over the data.

    Args:
        train_model: what `transform` or `load` returned, or a wrapper around it.
        batches: pairs of the model's input, or a tuple, list or dict of its inputs, and the target.
        metric: of one head's output and the target, a value for each of N samples, (N, ...), such as the error
            ``lambda logits, labels: (logits.argmax(1) != labels)``. Batches may differ in size.

    Returns:
        An `Evaluation`: ``heads``, one value a head, and ``ensemble``, that of the mean of their outputs.

    Raises:
        StateError: there is no batch, one is no pair, or the metric gives no tensor of a value for each sample.
    """
    call, found = all_heads(train_model), []
    whole = bool(plan_of(training_model(train_model)).interface.structured)
    with in_mode(train_model, False):
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise StateError(
                    f"A batch is of type {type(batch).__name__}.",
                    why="the model's inputs and the target are taken from it",
                    hint="give pairs, as a DataLoader may; of other batches a generator makes them: "
                    "((batch['x'], batch['y']) for batch in loader), or (((x, mask), y) for x, mask, y in loader)",
                )
            inputs, target = batch
            args, kwargs = _arguments(inputs, whole)
            heads = call(*args, **kwargs)
            values = [metric(output, target) for output in (*heads, mean_of_heads(heads))]
            if not all(isinstance(value, Tensor) and value.ndim for value in values):
                raise StateError(
                    "The metric gives no value for each sample.",
                    why="batches may differ in size, so that means of them can't be averaged",
                    hint="give one that returns (N, ...): lambda logits, labels: logits.argmax(1) != labels",
                )
            found.append(torch.stack(values))
    if not found:
        raise StateError("There are no batches.", hint="an iterator that was used up gives none: make it anew")
    means = torch.cat(found, 1).double().mean(1)
    return Evaluation(means[:-1], means[-1])


def _arguments(inputs: Any, whole: bool) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Those of a call: a DataLoader makes lists of tuples. Unless a model takes a list ``whole``, as one input."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, tuple) or (isinstance(inputs, list) and not whole) else ((inputs,), {})


@checked
def original(train_model: nn.Module) -> nn.Module:
    """The model that was transformed: the same object, whose tensors are the trunk's and head 0's.

    Where modules of the training model were replaced since, as by SyncBatchNorm, it is a copy that has the new ones.

    Args:
        train_model: what `transform` or `load` returned, or a wrapper around it.

    Raises:
        StateError: it is not a training model.
    """
    return training_model(train_model).own_root()
