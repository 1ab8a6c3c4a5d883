"""A Llama of 70 billion parameters, four heads, on 64 ranks: ``python -m tests.benchmarks.heads_at_scale``.

On a fake process group and the meta device, so that one machine shows it: which rank holds what, its bytes, the
seconds until a rank could load its checkpoint, and on paper what a step sends.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fxcollab
from fxcollab.distributed.spread import spread_of

SPLITS = ["model.layers.59", "model.layers.69"]
GIB = 2**30


def build(layers: int) -> nn.Module:
    """The model on meta, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def start(rank: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one rank does before it loads a checkpoint."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=arguments.world)
    shape = (arguments.heads, arguments.world // arguments.heads)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("heads", "data"))
    times = {}
    began = time.perf_counter()
    model = build(arguments.layers)
    times["model on meta"] = time.perf_counter() - began
    began = time.perf_counter()
    train_model = fxcollab.transform(
        model,
        splits=arguments.splits.split(","),
        example_inputs={"input_ids": torch.zeros(1, 128, dtype=torch.long, device="meta")},
        init="copy-anyway",
        seed=0,
    )
    times["transform"] = time.perf_counter() - began
    began = time.perf_counter()
    part = fxcollab.spread(train_model, mesh)
    times["spread"] = time.perf_counter() - began
    began = time.perf_counter()
    for name, module in part.named_modules():
        if (
            name.rpartition(".")[2].isdigit()
            and ".layers." in f".{name}"
            and any(module.parameters(recurse=False)) is False
        ):
            fully_shard(module, mesh=mesh["data"])
    fully_shard(part, mesh=mesh["data"])
    times["fully_shard"] = time.perf_counter() - began
    found = spread_of(part)
    assert found is not None
    held: dict[str, int] = {}
    local = 0
    for name, parameter in part.named_parameters():
        branch = "trunk" if not found.branch_of(name) else "b" + "_".join(map(str, found.branch_of(name)))
        held[branch] = held.get(branch, 0) + parameter.numel()
        local += parameter.to_local().numel()
    dist.destroy_process_group()
    whole = sum(parameter.numel() for parameter in train_model.parameters())
    return {
        "rank": rank,
        "heads": list(found.ranks.heads),
        "held": held,
        "local": local,
        "whole": whole,
        "times": times,
    }


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--splits", default=",".join(SPLITS))
    parser.add_argument("--world", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="of a row's batch")
    arguments = parser.parse_args()
    columns = arguments.world // arguments.heads
    for place in range(arguments.heads):
        row = start(place * columns, arguments)
        held = ", ".join(f"{name} {count / 1e9:.2f}B" for name, count in row["held"].items())
        total = sum(row["held"].values())
        print(f"ranks {row['rank']} to {row['rank'] + columns - 1}: heads {row['heads']}: {held}", flush=True)
        print(
            f"  {total / 1e9:.2f}B of {row['whole'] / 1e9:.2f}B parameters a column; a rank "
            f"{row['local'] * 2 / GIB:.2f} "
            f"GiB of weights, {row['local'] * 16 / GIB:.2f} GiB with gradients and Adam in float32"
        )
        print("  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in row["times"].items()), flush=True)
    _traffic(arguments, total)


def _traffic(arguments: argparse.Namespace, parameters: int) -> None:
    """What a rank sends in a step, in bfloat16, by formulas of ring algorithms."""
    columns, heads, tokens = arguments.world // arguments.heads, arguments.heads, arguments.tokens
    crossing = len(arguments.splits.split(",")) * tokens * 8192 * 2
    print(f"a step of {tokens} tokens a row, sent by each rank, GiB:")
    print(
        f"  over data: {3 * parameters * 2 * (columns - 1) / columns / GIB:.1f} (two all-gathers, a reduce-scatter)"
    )
    print(f"  over heads, gradients at splits: {2 * crossing * (heads - 1) / heads / GIB:.3f} (all-reduce)")
    print(f"  over heads, logits: {tokens * 128256 * 2 * (heads - 1) / GIB:.2f} (all-gather)")
    print(
        f"  over heads, were it the trunk's gradients: {2 * parameters * 2 / columns * (heads - 1) / heads / GIB:.2f}"
    )
    print("  what goes over heads depends on a row's tokens alone, not on the number of rows: 64 ranks or 4,096")


if __name__ == "__main__":
    main()
