"""DDP and FSDP2 under torchrun, with checkpoints that another number of processes can go on from.

torchrun --nproc-per-node 2 -m samples.integrations.distributed --strategy fsdp2 --epochs 2 -o run
torchrun --nproc-per-node 1 -m samples.integrations.distributed --strategy fsdp2 --epochs 3 -o run
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxcollab
from samples.integrations.digits import DigitNet, error, training_set

BATCH = 64  # over all processes


def main(strategy: str, epochs: int, output: Path, dtype: torch.dtype = torch.float32) -> None:
    """Train on this process' share of every batch; go on from ``output`` where there is a checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if BATCH % dist.get_world_size():
        raise SystemExit(f"{dist.get_world_size()} processes can't share a batch of {BATCH} evenly")
    torch.manual_seed(0)  # the same first weights everywhere
    train_model = fxcollab.transform(DigitNet, splits=["stage1", "stage2"], seed=0).to(device, dtype)
    model = _parallel(train_model, strategy, device)
    loss = fxcollab.CollaborativeLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    done = _restore(output, model, optimizer)
    images, labels = training_set().tensors
    for epoch in range(done, epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH)[: len(order) // BATCH]:
            share = batch.chunk(dist.get_world_size())[dist.get_rank()]
            optimizer.zero_grad()
            loss(model(images[share].to(device, dtype)), labels[share].to(device)).backward()
            optimizer.step()
        _save(output, epoch + 1, model, optimizer)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        kept = fxcollab.prune_state_dict(whole, head=0)
        save_file(kept, output / "weights.safetensors")
        network = DigitNet().to(dtype)
        network.load_state_dict(kept)
        print(f"error of the plain network {error(network):.1%}")
    dist.destroy_process_group()


def _parallel(model: nn.Module, strategy: str, device: str) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, nn.Sequential):  # the stages, those of the peers too
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _save(output: Path, epochs: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A folder an epoch; a kill while it is written leaves the one before."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(output / f"epoch{epochs}"))
    if dist.get_rank() == 0:
        (output / "done.part").write_text(str(epochs))
        (output / "done.part").replace(output / "done")


def _restore(output: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many epochs are done."""
    if not (output / "done").exists():
        return 0
    epochs = int((output / "done").read_text())
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=str(output / f"epoch{epochs}"))
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return epochs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("run"))
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args()
    main(options.strategy, options.epochs, options.output, getattr(torch, options.dtype))
