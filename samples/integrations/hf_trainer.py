"""Hugging Face's Trainer: the training model with the loss inside is one more model of transformers.

Evaluation, the best model, early stopping and checkpoints are the Trainer's own, and head 0's.

python -m samples.integrations.hf_trainer
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fxcollab
from fxcollab.integrations.transformers import with_loss
from samples.integrations.digits import test_set, training_set

CONFIG = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=64, num_labels=10, initializer_range=0.2,
)  # fmt: skip


class Examples(Dataset[dict[str, Tensor]]):
    """As the Trainer wants them: arguments of the model's forward, and ``labels``."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": label}


def error(prediction: EvalPrediction) -> dict[str, float]:
    """The share of wrong classes."""
    return {"error": float((prediction.predictions.argmax(1) != prediction.label_ids).mean())}


def main(epochs: int = 3, folder: Path | None = None) -> float:
    """Train, keep the best model, prune the Trainer's checkpoint, load it into the plain network: its error."""
    torch.manual_seed(0)
    train_model = fxcollab.transform(
        lambda: ViTForImageClassification(CONFIG),
        splits=["vit.layers.0", "vit.layers.1"],
        example_inputs={"pixel_values": torch.rand(1, 1, 8, 8)},
        seed=0,
    )
    with tempfile.TemporaryDirectory() as temporary:
        output = folder or Path(temporary)
        options = TrainingArguments(
            str(output),
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="error",
            greater_is_better=False,
            seed=0,
        )
        data = {"eval_dataset": Examples(TensorDataset(*test_set())), "compute_metrics": error}
        model = with_loss(train_model, fxcollab.CollaborativeLoss())
        trainer = Trainer(model, options, train_dataset=Examples(training_set()), **data)
        trainer.train()
        trainer.save_model(str(output))
        checkpoint = load_file(output / "model.safetensors")
        network = ViTForImageClassification(CONFIG)
        network.load_state_dict(fxcollab.prune_state_dict(checkpoint, head=0))
        plain = Trainer(network, options, **data).evaluate()
    found = trainer.evaluate()
    assert (plain["eval_loss"], plain["eval_error"]) == (found["eval_loss"], found["eval_error"])
    return float(plain["eval_error"])


if __name__ == "__main__":
    print(f"error of the plain network {main():.1%}")
