"""The plain loop with what it often has: compilation, autocast, a gradient scaler, accumulation, clipping, EMA.

python -m samples.integrations.plain_loop --compile --dtype float16
"""

from __future__ import annotations

import argparse

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import fxcollab
from samples.integrations.digits import DigitNet, error, training_set


def main(epochs: int = 3, dtype: torch.dtype = torch.bfloat16, compiled: bool = False, accumulate: int = 2) -> float:
    """Train, and prune the average of the weights: its error as a plain network."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_model = fxcollab.transform(DigitNet, splits=["stage1", "stage2"], seed=0).to(device)
    average = AveragedModel(train_model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    model = torch.compile(train_model) if compiled else train_model
    scaled = dtype == torch.float16
    loss = fxcollab.CollaborativeLoss(finite=not scaled)  # the scaler skips steps that overflow
    scaler = torch.amp.GradScaler(device, enabled=scaled)
    optimizer = torch.optim.SGD(train_model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for step, (images, labels) in enumerate(DataLoader(training_set(), 32, shuffle=True, drop_last=True), 1):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                total = loss(model(images.to(device)), labels.to(device))
            scaler.scale(total / accumulate).backward()
            if step % accumulate == 0:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(train_model.parameters(), 5.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                average.update_parameters(train_model)
    network = DigitNet()
    network.load_state_dict(fxcollab.prune_state_dict(average.state_dict(), head=0))
    return error(network)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    print(f"error of the plain network {main(dtype=getattr(torch, options.dtype), compiled=options.compile):.1%}")
