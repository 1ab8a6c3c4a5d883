"""Head parallelism: each rank has the trunk and heads of its own, on the same batch.

A rank runs the part of the training graph that its heads need, then gathers the outputs of all, so that every rank
computes the loss of all heads. Where a value leaves a branch that several ranks have, its gradients are summed over
them. So a rank has the gradients that one process would have for all that it holds, and what torch does over other
dimensions of a mesh (DDP, FSDP2, tensor parallelism) does not know of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fxcollab._torch import pytree
from fxcollab.analysis.partition import partition
from fxcollab.arguments import checked
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.distributed.ranks import Ranks, heads_of, place_ranks
from fxcollab.distributed.subtree import keep_heads
from fxcollab.errors import StateError
from fxcollab.functional import tensors_of
from fxcollab.plan import Plan, plan_of, unwrapped
from fxcollab.rewriting.eval_output import mean_of_heads
from fxcollab.rewriting.prune import prune
from fxcollab.rewriting.state_dict import without_infixes
from fxcollab.runtime.exchange import Gathered, local, register
from fxcollab.tree import Path, original_name, parse_branch_name

SPREAD_KEY = "fxcollab.spread"


@dataclass(frozen=True, eq=False)
class Spread:
    """A part's place in the whole training model.

    Attributes:
        plan: that of the whole.
        ranks: which rank has which heads.
        keys: those of the whole training model's state dict, in order.
        levels: the levels of the original's state.
        random: whether anything draws random numbers.
    """

    plan: Plan
    ranks: Ranks
    keys: tuple[str, ...]
    levels: Mapping[str, int]
    random: bool

    def branch_of(self, name: str) -> Path:
        """The branch that a tensor of the training model belongs to."""
        name, peers = without_infixes(name), self.plan.options.peers
        if not name.startswith(f"{peers}."):
            return (0,) * self.levels.get(name, 0)
        path = parse_branch_name(name.split(".", 2)[1])
        assert path is not None
        return path

    def first(self, name: str) -> int:
        """The first rank of the row that has it."""
        return self.ranks.row[self.ranks.holders(self.branch_of(name))[0]]


@checked
def spread(
    train_model: CollabGraphModule, mesh: DeviceMesh | None = None, *, check_every: int = 1
) -> CollabGraphModule:
    """The part of a training model that this rank trains; its forward returns what the whole's would.

    The ranks along the mesh's dimension ``heads`` share the heads, and pass the same batches and labels. The part
    shares its tensors with ``train_model``; delete that to free the other ranks' heads. Loss, optimizer and loop stay
    as they are: a rank has the gradients, of all that it holds, that one process with all heads would have.

    The part is a module as any other, under the names of the whole: what torch does over other dimensions of the mesh
    comes after, as for a single network: ``parallelize_module(part, mesh["tensor"], ...)`` (see `parallel_plan`),
    ``torch.compile``, ``fully_shard(part, mesh=mesh["data"])``, or ``DistributedDataParallel(part,
    process_group=mesh["data"].get_group())``. Never give these the dimension ``heads`` for what a rank has alone.
    On the meta device: ``spread``, ``fully_shard``, ``part.to_empty(device=...)``, then load a checkpoint.

    Norms differ from rank to rank: clip by `gradient_norm`. A gradient scaler has to agree over ranks:
    ``torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler``. BatchNorm over data: ``SyncBatchNorm`` with the
    group of ``mesh["data"]``. Where anything is random, every forward in train mode begins with one seed for the row.

    Args:
        train_model: what `transform` or `load` returned.
        mesh: any mesh with a dimension ``heads``, a slice included; or one of one dimension. By default all ranks.
        check_every: how often the ranks of a row compare their batches, the values of what they share, and the
            gradients of the loss: at every so many steps (default 1), never for 0. It waits for the device.

    Raises:
        StateError: ``train_model`` is not a training model, or there is no process group. At a step: the ranks'
            batches, labels or weights differ, or a rank doesn't answer within the process group's time-out.
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
    cut = partition(prune(train_model), plan.tree)
    part = keep_heads(train_model, ranks, cut.state, check_every)
    random = any(cut.observation.of(node).random for nodes in cut.nodes.values() for node in nodes)
    keys, part.is_part = tuple(train_model.state_dict()), True
    part.meta[SPREAD_KEY] = Spread(plan, ranks, keys, cut.state, random)
    align(part)
    if random:
        part.register_forward_pre_hook(torch.compiler.disable(partial(_seed, ranks)))  # type: ignore[no-untyped-call]
    gather = _Gather(plan, ranks, check_every)
    part.register_forward_pre_hook(gather.check_batch, with_kwargs=True)
    part.register_forward_hook(gather, with_kwargs=True)
    return part


class _Gather:
    """A forward hook: a rank's outputs become those of all heads, in eval mode what that returns."""

    def __init__(self, plan: Plan, ranks: Ranks, check_every: int) -> None:
        self._plan, self._place, self._every = plan, ranks.place, check_every
        self._group, self._always = register(ranks.group), torch.zeros((), requires_grad=True)
        self._counts = [len(heads_of(plan.tree, len(ranks.row), place)) for place in range(len(ranks.row))]

    def __call__(self, module: CollabGraphModule, args: Any, kwargs: Any, outputs: tuple[Any, ...]) -> Any:
        gathered, eval_output = self._gathered(outputs), self._plan.options.eval_output
        if module.training or module.returns_all or eval_output == "all":
            return gathered
        return gathered[0] if eval_output == "head" else mean_of_heads(gathered)

    def check_batch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward: whether all ranks have the same batch."""
        batch = [leaf.detach() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        torch.ops.fxcollab.agree(batch, "batch", 1e-4, self._every, self._group)

    def _gathered(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        flat, specs = zip(*map(pytree.tree_flatten, outputs), strict=True)
        own = [leaf for leaves in flat for leaf in leaves if isinstance(leaf, Tensor)]
        first = [leaf.detach() for leaf in own[: len(own) // len(outputs)]]
        torch.ops.fxcollab.agree(first, "heads", 0.0, self._every, self._group)
        gathered = iter(Gathered.apply(self._counts, self._place, self._group, self._every, self._always, *own))
        heads = range(sum(self._counts))
        leaves = [[next(gathered) if isinstance(leaf, Tensor) else leaf for leaf in flat[0]] for _ in heads]
        return tuple(pytree.tree_unflatten(head, specs[0]) for head in leaves)


def _seed(ranks: Ranks, module: nn.Module, args: Any) -> None:
    """All ranks of a row begin with one seed, which the first one draws."""
    if module.training:
        seed = torch.randint(2**62, (), device=_device(module))
        dist.broadcast(seed, ranks.row[0], group=ranks.group)
        torch.manual_seed(int(seed))


@checked
def align(part: nn.Module) -> None:
    """Give what several ranks have the first one's values; all ranks must call it, and `spread` does.

    Later on it is needed where ranks loaded different weights, and, every few thousand steps, where kernels are not
    deterministic and FSDP2 does not synchronise the trunk over ``heads``.

    Args:
        part: what `spread` returned, or a wrapper around it.

    Raises:
        StateError: ``part`` is something else.
    """
    model, found = _part(part)
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            own = local(tensor)
            alike = found.ranks.others if own is tensor else ()
            for group in (*alike, found.ranks.groups[found.branch_of(name)]):
                if group is not None and not own.is_meta:
                    value = own.detach().contiguous()
                    dist.broadcast(value, dist.get_global_rank(group, 0), group=group)
                    own.copy_(value)


@checked
def gathered_state_dict(part: nn.Module) -> dict[str, Any]:
    """The state dict of the whole training model, on every rank; all ranks must call it.

    Tensors are copies. Where several ranks have a tensor, the first one's values are taken. For models that no rank
    can hold save ``part.state_dict()`` by ``torch.distributed.checkpoint``: its keys are those of the whole.

    Args:
        part: what `spread` returned, or a wrapper around it.

    Raises:
        StateError: ``part`` is something else.
    """
    model, found = _part(part)
    own, row = {key: whole(value) for key, value in _state_of(model).items()}, found.ranks
    first = {key: own[key] for key in found.keys if found.first(key) == dist.get_rank()}
    everyone: list[dict[str, Any]] = [{} for _ in row.row]
    shapes = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in first.items()}
    dist.all_gather_object(everyone, shapes, group=row.group)
    state: dict[str, Any] = {}
    for key in found.keys:
        state[key] = next(rank[key] for rank in everyone if key in rank)
        if isinstance(state[key], Tensor):
            state[key] = torch.empty_like(state[key], device=_device(model))
            state[key].copy_(first.get(key, state[key]))
            dist.broadcast(state[key], found.first(key), group=row.group)
    return state


@checked
def head_state_dicts(part: nn.Module) -> list[dict[str, Any]]:
    """The tensors of each of this rank's heads under the original's names, to load an original's checkpoint into.

    Ranks with fewer heads have their last one again, so that every rank of a row loads as often:
    ``for state in head_state_dicts(part): torch.distributed.checkpoint.load(state, checkpoint_id=...)``. All heads
    then start as that original: redraw their last layers, as ``init="finetune"`` does.

    Args:
        part: what `spread` returned, or a wrapper around it.

    Raises:
        StateError: ``part`` is something else.
    """
    model, found = _part(part)
    tree, own, peers = found.plan.tree, found.ranks.heads, found.plan.options.peers
    turns = max(len(heads_of(tree, len(found.ranks.row), place)) for place in range(len(found.ranks.row)))
    branches = {key: (found.branch_of(key), value) for key, value in _state_of(model).items()}
    paths = [tree.head_path(own[min(turn, len(own) - 1)]) for turn in range(turns)]
    return [
        {original_name(k, peers=peers): value for k, (b, value) in branches.items() if b == path[: len(b)]}
        for path in paths
    ]


@checked
def gradient_norm(part: nn.Module) -> Tensor:
    """The 2-norm of all gradients of the whole training model, on all ranks; all ranks must call it.

    For ``torch.nn.utils.clip_grads_with_norm_(part.parameters(), max_norm, gradient_norm(part))``.

    Args:
        part: what `spread` returned, or a wrapper around it, after a backward.

    Raises:
        StateError: ``part`` is something else.
    """
    model, found = _part(part)
    total = torch.zeros((), dtype=torch.float64, device=_device(model))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = whole(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)).square()
            if found.first(name) == dist.get_rank():
                total += square
    dist.all_reduce(total, group=found.ranks.group)
    return total.sqrt()


def spread_of(module: nn.Module) -> Spread | None:
    """What `spread` noted of a part, also inside wrappers; None for anything else."""
    found = (inner.meta.get(SPREAD_KEY) for inner in module.modules() if isinstance(inner, CollabGraphModule))
    return next(filter(None, found), None)


def _part(part: nn.Module) -> tuple[CollabGraphModule, Spread]:
    found = spread_of(part)
    if found is None:
        raise StateError(
            f"{type(part).__qualname__} is not a part of a training model.",
            why="it was not made by fxcollab.spread",
            hint="pass what spread returned",
        )
    return unwrapped(part), found


def _state_of(model: nn.Module) -> dict[str, Any]:
    return {without_infixes(key): value for key, value in model.state_dict().items()}


def whole(value: Any) -> Any:
    """All of a ``DTensor``; anything else itself. Its ranks must all call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in tensors_of(model).values()), torch.device("cpu"))
