"""Lightning: a module that trains any training model, and the plain network from its checkpoint.

python -m samples.integrations.lightning_module
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning as L  # its own short name
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import fxcollab
from samples.integrations.digits import DigitNet, error, test_set, training_set


class CollaborativeModule(L.LightningModule):
    """Trains all heads; reports the error of head 0, which is kept."""

    def __init__(self, model: fxcollab.CollabGraphModule, loss: fxcollab.Objective, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.learning_rate = learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.loss(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        wrong = self.model(images).argmax(1) != labels  # eval mode returns head 0
        self.log("error", wrong.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), self.learning_rate, 0.9, weight_decay=1e-4)


def main(epochs: int = 3, folder: Path | None = None) -> float:
    """Train, save as Lightning does, prune the checkpoint, load it into the plain network: its error."""
    L.seed_everything(0, verbose=False)
    train_model = fxcollab.transform(DigitNet, splits=["stage1", "stage2"], seed=0)
    module = CollaborativeModule(train_model, fxcollab.CollaborativeLoss(), learning_rate=0.05)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_model_summary=False, enable_checkpointing=False
    )
    test = DataLoader(list(zip(*test_set(), strict=True)), 300)
    trainer.fit(module, DataLoader(training_set(), 64, shuffle=True), test)
    with tempfile.TemporaryDirectory() as temporary:
        file = (folder or Path(temporary)) / "last.ckpt"
        trainer.save_checkpoint(file, weights_only=True)
        checkpoint = torch.load(file, weights_only=True)["state_dict"]  # names begin with "model."
    network = DigitNet()
    network.load_state_dict(fxcollab.prune_state_dict(checkpoint, head=0))
    return error(network)


if __name__ == "__main__":
    print(f"error of the plain network {main():.1%}")
