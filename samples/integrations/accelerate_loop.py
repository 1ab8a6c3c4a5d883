"""Accelerate: the plain loop, with gradient accumulation and clipping.

python -m samples.integrations.accelerate_loop, or: accelerate launch -m samples.integrations.accelerate_loop
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import fxcollab
from samples.integrations.digits import DigitNet, error, training_set


def main(epochs: int = 3) -> float:
    """Train, prune the state that Accelerate gives, load it into the plain network: its error."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    train_model = fxcollab.transform(DigitNet, splits=["stage1", "stage2"], seed=0)
    loss = fxcollab.CollaborativeLoss()
    optimizer = torch.optim.SGD(train_model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    model, optimizer, loader = accelerator.prepare(
        train_model, optimizer, DataLoader(training_set(), 32, shuffle=True)
    )
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model(images), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
    checkpoint = accelerator.get_state_dict(model)
    network = DigitNet()
    network.load_state_dict(fxcollab.prune_state_dict(checkpoint, head=0))
    return error(network)


if __name__ == "__main__":
    print(f"error of the plain network {main():.1%}")
