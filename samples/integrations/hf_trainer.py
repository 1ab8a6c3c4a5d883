"""Hugging Face's Trainer: hand it the training model, and the loss as ``compute_loss_func``.

Its own evaluation drops the first of several outputs, which here is head 0: evaluate the network that is kept, as at
the end of this script.

python -m samples.integrations.hf_trainer
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fxcollab
from samples.integrations.digits import error, training_set

CONFIG = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=64, num_labels=10, initializer_range=0.2,
)  # fmt: skip


class Examples(Dataset[dict[str, Tensor]]):
    """As the Trainer wants them: arguments of the model's forward, and ``labels``."""

    def __init__(self) -> None:
        self.data = training_set()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": label}


class Logits(torch.nn.Module):
    """The plain network, for evaluation."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=images).logits
        return logits


def main(epochs: int = 3, folder: Path | None = None) -> float:
    """Train, let the Trainer save, prune its checkpoint, load it into the plain network: its error."""
    torch.manual_seed(0)
    train_model = fxcollab.transform(
        lambda: ViTForImageClassification(CONFIG),
        splits=["vit.layers.0", "vit.layers.1"],
        example_inputs={"pixel_values": torch.rand(1, 1, 8, 8)},
        seed=0,
    )
    loss = fxcollab.CollaborativeLoss()

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        value: Tensor = loss(outputs, labels)
        # The trainer adds up the losses of the batches that it accumulates, and says how many samples they hold.
        return value * (len(labels) / num_items_in_batch) if num_items_in_batch else value

    with tempfile.TemporaryDirectory() as temporary:
        output = folder or Path(temporary)
        options = TrainingArguments(
            str(output),
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            seed=0,
        )
        trainer = Trainer(train_model, options, train_dataset=Examples(), compute_loss_func=compute_loss)
        trainer.train()
        trainer.save_model(str(output))
        checkpoint = load_file(output / "model.safetensors")
    network = ViTForImageClassification(CONFIG)
    network.load_state_dict(fxcollab.prune_state_dict(checkpoint, head=0))
    return error(Logits(network))


if __name__ == "__main__":
    print(f"error of the plain network {main():.1%}")
