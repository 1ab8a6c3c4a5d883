"""Lightning: the library's module trains all heads; its checkpoint gives the plain network.

python -m samples.integrations.lightning_module
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import lightning as L  # its own short name
import torch
from torch.utils.data import DataLoader

import fxcollab
from fxcollab.integrations.lightning import CollaborativeModule
from samples.integrations.digits import DigitNet, error, test_set, training_set


def main(epochs: int = 3, folder: Path | None = None) -> float:
    """Train, save as Lightning does, prune the checkpoint, load it into the plain network: its error."""
    L.seed_everything(0, verbose=False)
    train_model = fxcollab.transform(DigitNet, splits=["stage1", "stage2"], seed=0)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)
    module = CollaborativeModule(train_model, fxcollab.CollaborativeLoss(), sgd)
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
    assert error(network) == float(trainer.callback_metrics["val_error"])  # what was validated is what is kept
    return error(network)


if __name__ == "__main__":
    print(f"error of the plain network {main():.1%}")
