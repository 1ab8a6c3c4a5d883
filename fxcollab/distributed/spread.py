"""Head parallelism: each rank has the trunk and heads of its own, on the same batch.

A rank runs the part of the training graph that its heads need, then gathers the outputs of all, so that every rank
computes the loss of all heads. Gradients of what several ranks have are summed; with the rescale in the graph that is
the mean of equation 6, and equals what one process with all heads computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fxcollab.analysis.partition import partition
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.distributed.gather import Gather
from fxcollab.distributed.ranks import Ranks, place_ranks
from fxcollab.distributed.subtree import keep_heads
from fxcollab.errors import StateError
from fxcollab.plan import plan_of
from fxcollab.rewriting.prune import prune
from fxcollab.tree import Path, parse_branch_name

SPREAD_KEY = "fxcollab.spread"


@dataclass(frozen=True, eq=False)
class Spread:
    """A part's place in the whole training model.

    Attributes:
        ranks: which rank has which heads.
        keys: the keys of the whole training model's state dict, in order, with the branch that each belongs to.
        tensors: the branch of every parameter and buffer of this rank.
    """

    ranks: Ranks
    keys: Mapping[str, Path]
    tensors: Mapping[str, Path]


def spread(train_model: CollabGraphModule, mesh: DeviceMesh | None = None) -> CollabGraphModule:
    """The part of a training model that this rank trains; its forward returns what the whole's would.

    All ranks of the mesh call it with the same training model, on the device to train on, and then pass the same
    batches along the dimension ``heads``. The part shares its tensors with ``train_model``; delete that to free the
    other ranks' heads. Loss, optimizer and loop stay as they are: gradients are those of the training model in one
    process, and along a dimension ``data`` their mean over batches. They come from ``backward()``; the gradient of an
    input, and what ``torch.autograd.grad`` returns, is this rank's share, and a backward that fails loses the
    gradients accumulated before. Heads that the loss leaves out have gradients of zero, not None.

    Norms differ from rank to rank: clip by `gradient_norm`. Under a gradient scaler ranks may skip different steps:
    use bfloat16. Every rank draws its own random numbers: use one seed for all ranks, so that the trunk's are the
    same; sibling branches on different ranks then draw the same ones, too. Where nothing in the trunk is random, use
    different seeds.

    Args:
        train_model: what `transform` or `load` returned.
        mesh: of one dimension, or of two of which one is named ``heads``. By default all ranks in one dimension.

    Raises:
        StateError: ``train_model`` is not a training model, or there is no process group.
        PatternError: there are more ranks along the mesh than heads, or only one.
    """
    plan = plan_of(train_model)
    if not dist.is_initialized():
        raise StateError(
            "There are no ranks to distribute heads over.",
            why="torch.distributed has no process group",
            hint="call torch.distributed.init_process_group() first, under torchrun",
        )
    mesh = mesh or init_device_mesh(_device(train_model).type, (dist.get_world_size(),))
    ranks = place_ranks(plan.tree, mesh)
    levels = partition(prune(train_model), plan.tree).state
    part = keep_heads(train_model, ranks.heads, levels)
    tensors = {name: _branch_of(name, plan.options.peers, levels) for name, _ in _tensors(part)}
    keys = {key: _branch_of(key, plan.options.peers, levels) for key in train_model.state_dict()}
    part.meta[SPREAD_KEY] = Spread(ranks, keys, tensors)
    _start_alike(part, tensors, ranks)
    parameters: dict[Path, list[nn.Parameter]] = {path: [] for path in ranks.branches}
    for name, parameter in part.named_parameters():
        parameters[tensors[name]].append(parameter)
    part.register_forward_hook(Gather(ranks, parameters, plan.options.eval_output), with_kwargs=True)
    return part


def gathered_state_dict(part: nn.Module) -> dict[str, Any]:
    """The state dict of the whole training model, on every rank; all ranks must call it.

    Tensors are copies. Where several ranks have a tensor, the first one's values are taken.

    Args:
        part: what `spread` returned.

    Raises:
        StateError: ``part`` is something else.
    """
    found = _spread_of(part)
    own = part.state_dict()
    row = found.ranks
    described = {key: _description(own[key]) for key, path in found.keys.items() if row.owner(path) == row.rank}
    everyone: list[dict[str, Any]] = [{} for _ in row.row]
    dist.all_gather_object(everyone, described, group=row.group)
    state: dict[str, Any] = {}
    for key, path in found.keys.items():
        shape, dtype, value = next(rank[key] for rank in everyone if key in rank)
        if dtype is None:
            state[key] = value
            continue
        state[key] = torch.empty(shape, dtype=dtype, device=_device(part))
        if row.owner(path) == row.rank:
            state[key].copy_(own[key])
        dist.broadcast(state[key], row.owner(path), group=row.group)
    return state


def gradient_norm(part: nn.Module) -> Tensor:
    """The 2-norm of all gradients of the whole training model, on all ranks; all ranks must call it.

    For ``torch.nn.utils.clip_grads_with_norm_(part.parameters(), max_norm, gradient_norm(part))``.

    Args:
        part: what `spread` returned, after a backward.

    Raises:
        StateError: ``part`` is something else.
    """
    found = _spread_of(part)
    row = found.ranks
    own = [
        parameter.grad
        for name, parameter in part.named_parameters()
        if parameter.grad is not None and row.owner(found.tensors[name]) == row.rank
    ]
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float64).square() for gradient in own]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=_device(part))
    dist.all_reduce(total, group=row.group)
    return total.sqrt()


def _spread_of(part: nn.Module) -> Spread:
    found = getattr(part, "meta", {}).get(SPREAD_KEY) if isinstance(part, CollabGraphModule) else None
    if not isinstance(found, Spread):
        raise StateError(
            f"{type(part).__qualname__} is not a part of a training model.",
            why="it was not made by fxcollab.spread",
            hint="pass what spread returned",
        )
    return found


def _branch_of(name: str, peers: str, levels: Mapping[str, int]) -> Path:
    """The branch that a tensor of a training model belongs to."""
    if not name.startswith(f"{peers}."):
        return (0,) * levels.get(name, 0)
    _, branch, _ = name.split(".", 2)
    path = parse_branch_name(branch)
    assert path is not None
    return path


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _start_alike(part: nn.Module, tensors: Mapping[str, Path], ranks: Ranks) -> None:
    """Ranks that share a tensor start with the first one's values."""
    with torch.no_grad():
        for name, tensor in _tensors(part):
            for group in (ranks.data, ranks.branches[tensors[name]]):
                if group is not None:
                    value = tensor.detach().contiguous()
                    dist.broadcast(value, dist.get_global_rank(group, 0), group=group)
                    tensor.copy_(value)


def _description(value: object) -> tuple[Any, Any, Any]:
    return (tuple(value.shape), value.dtype, None) if isinstance(value, Tensor) else (None, None, value)


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for _, tensor in _tensors(model)), torch.device("cpu"))
