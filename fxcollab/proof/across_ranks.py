"""The proof across ranks: gradients of a part, as it is set up for training, against one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxcollab._torch import pytree
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.distributed.spread import Spread, gathered_state_dict, whole
from fxcollab.errors import StateError
from fxcollab.heads import all_heads
from fxcollab.proof.report import Check, Report
from fxcollab.tracing.interface import ExampleInputs


def verify_part(
    train_model: CollabGraphModule, part: nn.Module, found: Spread, inputs: ExampleInputs | None
) -> Report:
    """Compare the gradients of a part with those that ``train_model``, with the part's weights, has in one process.

    Each rank gives the inputs that it would train on; those of one process are the mean over all ranks'. It runs in
    train mode, in eval mode where something draws random numbers. The part's gradients and buffers are restored.
    """
    if inputs is None:
        raise StateError(
            "A part of a training model is verified on inputs of yours.",
            why="each rank takes those of its row, and ranks of one row take the same",
            hint="fxcollab.verify(train_model, part, example_inputs) on every rank",
        )
    reference, training = copy.deepcopy(train_model).to(next(part.parameters()).device), not found.random
    reference.load_state_dict(gathered_state_dict(part))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pytree.tree_map(lambda leaf: leaf.cpu(), inputs))
    for given in everyone:
        _backward(_loss_of(reference.train(training), given) / len(everyone))
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in part.named_buffers()}
    gradients, mode = {name: p.grad for name, p in part.named_parameters()}, part.training
    part.zero_grad()
    _backward(_loss_of(part.train(training), inputs))
    compared = {name: whole(p.grad) for name, p in _named(part) if p.grad is not None}
    part.train(mode)
    for name, p in part.named_parameters():
        p.grad = gradients[name]
    with torch.no_grad():
        for name, buffer in part.named_buffers():
            buffer.copy_(buffers[name])
    return Report((_check(compared, expected, len(everyone)),))


def _backward(loss: Any) -> None:
    loss.backward()


def _named(part: nn.Module) -> list[tuple[str, nn.Parameter]]:
    model = next(inner for inner in part.modules() if isinstance(inner, CollabGraphModule))
    return list(model.named_parameters())


def _loss_of(model: nn.Module, inputs: ExampleInputs) -> Tensor:
    device = next(model.parameters()).device
    given: Any = pytree.tree_map(lambda leaf: leaf.to(device), inputs)
    call = all_heads(model)
    outputs = call(**given) if isinstance(given, dict) else call(*given)
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([(leaf + 0.1).square().mean() for leaf in leaves]).sum()


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], ranks: int) -> Check:
    name, worst, where = f"gradients of {ranks} ranks equal one process's", 0.0, ""
    for key, gradient in found.items():
        if key not in expected:
            return Check(name, False, f"{key} has none in one process")
        scale = torch.linalg.vector_norm(expected[key]).clamp(min=torch.finfo(gradient.dtype).tiny)
        difference = float(torch.linalg.vector_norm(gradient - expected[key]) / scale)
        if not difference <= torch.finfo(gradient.dtype).eps ** 0.5 and not where:
            where = f" at {key}"
        worst = max(worst, difference)
    return Check(
        name, not where, f"{len(found)} tensors of this rank, largest relative difference {worst:.1e}{where}"
    )
