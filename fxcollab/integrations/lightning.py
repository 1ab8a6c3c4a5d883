"""A training model as a module of Lightning (extra ``lightning``).

module = CollaborativeModule(train_model, fxcollab.CollaborativeLoss(), lambda p: torch.optim.SGD(p, 0.1))
lightning.Trainer(...).fit(module, train_loader, validation_loader)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
from torch import Tensor, nn

from fxcollab.objectives.objective import Objective


class CollaborativeModule(lightning.LightningModule):
    """Trains all heads, and validates the one that is kept.

    Batches are pairs of inputs and labels; for others override `batch`. Training logs ``loss``, the total over heads.
    Validation logs what it would for the plain model: ``val_loss``, the loss on the labels, and for class indices
    ``val_error``, the share of wrong ones. `prune_state_dict` takes the state dict of a checkpoint.

    Args:
        model: what `transform` or `load` returned.
        loss: an objective of the heads' outputs and the labels.
        optimizer: makes of the parameters what Lightning's
            ``configure_optimizers`` may return, such as an optimizer.
    """

    def __init__(self, model: nn.Module, loss: Objective, optimizer: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.loss, self.optimizer = model, loss, optimizer

    def batch(self, batch: Any) -> tuple[Any, Any]:
        """The model's input and the labels in a batch."""
        inputs, labels = batch
        return inputs, labels

    def forward(self, inputs: Any) -> Any:
        """What the model returns: head 0's output in eval mode."""
        return self.model(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The total loss."""
        inputs, labels = self.batch(batch)
        total: Tensor = self.loss(self(inputs), labels)
        self.log("loss", total, prog_bar=True, batch_size=len(labels))
        return total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss and the error of head 0."""
        inputs, labels = self.batch(batch)
        heads, target, _ = self.loss.read((self(inputs),), labels)
        [hard], [logits] = self.loss.hard_losses(heads, target), heads
        found = {"val_loss": hard}
        if not target.is_floating_point():
            labelled = self.loss.task.labelled(target, logits)
            wrong = logits.argmax(1) != target
            found["val_error"] = (wrong if labelled is None else wrong[labelled]).float().mean()
        self.log_dict(found, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """What ``optimizer`` makes."""
        return self.optimizer(self.model.parameters())
