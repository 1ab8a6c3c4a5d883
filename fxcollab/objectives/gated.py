"""ONE: a gate makes a teacher of all heads.

Lan et al., "Knowledge Distillation by On-the-Fly Native Ensemble", 2018.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from fxcollab.arguments import fits
from fxcollab.errors import ObjectiveError
from fxcollab.objectives.consensus import require_peers
from fxcollab.objectives.objective import Options, total
from fxcollab.objectives.options import switch
from fxcollab.objectives.outputs import at_least_float32, described, widened
from fxcollab.objectives.two_terms import TwoTerms


class Gate(nn.Module):
    """Weights of the heads, from features that all heads share: linear, batch norm, ReLU, softmax.

    Args:
        features: channels of the shared features.
        heads: H.

    Raises:
        ObjectiveError: they are no numbers above 0.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        if not all(fits(count, int) and count > 0 for count in (features, heads)):
            raise ObjectiveError(
                f"A gate can't be made of {features!r} features for {heads!r} heads.",
                hint="give numbers of channels and of heads, as in ONELoss(features=128, heads=4)",
            )
        self.linear = nn.Linear(features, heads)
        self.norm = nn.BatchNorm1d(heads)

    def forward(self, features: Tensor) -> Tensor:
        """Weights (N, H) that sum to one, of features (N, C, ...), averaged over positions."""
        pooled = features.flatten(2).mean(2) if features.dim() > 2 else features
        return torch.softmax(torch.relu(self.norm(self.linear(pooled))), dim=1)


class ONELoss(TwoTerms):
    """The loss of ONE: labels for all heads and for a gated ensemble of them, and the ensemble for all heads.

    ``J_hard(y, z_e) + total over the heads h of J_hard(y, z_h) + T^2 * KL(p_e || p_h)``, z_e being the sum of the
    heads' logits weighted by the gate. Call it with ``(outputs, target, features)``: ``features`` is a value of the
    trunk, (N, C, ...), from which the gate computes its weights. `per_head` has the heads' losses without that of the
    ensemble, from which the gate learns.

    The gate belongs to the loss: pass ``loss.parameters()`` to the optimizer, save ``loss.state_dict()`` in
    checkpoints, wrap the loss in DDP like the model, call ``loss.eval()`` with it.

    Args:
        features: channels of the features that the gate takes; or a gate of your own, a module that computes weights
            (N, H) from them.
        heads: H.
        temperature: T, finite and above 0 (default 3, as in its paper).
        detach: whether the ensemble is a constant to the heads that learn from it (default True).
        options: those of every `Objective`: task, hard, logits, consensus_on, reduction, finite.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is not a loss of logits or reduces otherwise.

    Example:
        >>> seen = {}
        >>> keep = lambda module, inputs, output: seen.update(features=output)
        >>> train_model.layer2.register_forward_hook(keep)   # the trunk ends here
        >>> loss = ONELoss(features=128, heads=4)
        >>> loss(train_model(x), target, seen["features"]).backward()
    """

    inputs = "the gate, the target"

    def __init__(
        self,
        features: int | nn.Module,
        heads: int,
        temperature: float = 3.0,
        *,
        detach: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.gate = features if isinstance(features, nn.Module) else Gate(features, heads)
        self.temperature = temperature
        self.detach = switch("detach", detach)

    @property
    def weights(self) -> tuple[float, float]:
        """Of the labels and of the divergence."""
        return 1.0, 1.0

    def total(self, heads: list[Tensor], target: Tensor | None, features: Tensor | None = None) -> Tensor:
        """The loss of the ensemble on the labels, and the sum over heads."""
        heads = widened(heads)
        ensemble = self._ensemble(heads, features)
        [hard] = self.hard_losses([ensemble], target)
        return hard + total(self.weighted(heads, target, self._taught(heads, ensemble)))

    def soft_terms(self, heads: list[Tensor], target: Tensor | None, features: Tensor | None = None) -> list[Tensor]:
        """Every head's divergence from the ensemble.

        Raises:
            ObjectiveError: there are no features, or the gate doesn't give one weight per head.
        """
        return self._taught(heads, self._ensemble(heads, features))

    def _taught(self, heads: list[Tensor], ensemble: Tensor) -> list[Tensor]:
        teacher = ensemble.detach() if self.detach else ensemble
        return self.task.divergences(teacher, heads, self.temperature)

    def _ensemble(self, heads: list[Tensor], features: Tensor | None) -> Tensor:
        """The sum of the heads' logits weighted by the gate."""
        require_peers(heads)
        if not isinstance(features, Tensor):
            raise ObjectiveError(
                f"The gate takes a tensor of features, not {described(features)}.",
                why="ONE weights the heads by a value that they share.",
                hint="Keep the trunk's value by a forward hook and pass it: loss(outputs, target, features).",
            )
        if isinstance(self.gate, Gate):
            _require_features(self.gate, features)
        dtype = next((p.dtype for p in self.gate.parameters()), features.dtype)
        weights = at_least_float32(self.gate(features.to(dtype)))
        if weights.shape != (len(heads[0]), len(heads)):
            raise ObjectiveError(
                f"The gate gives weights of shape {tuple(weights.shape)} for {len(heads)} heads.",
                why=f"It must give one per sample and head: {(len(heads[0]), len(heads))}.",
                hint=f"ONELoss(features=..., heads={len(heads)})",
            )
        stacked = torch.stack(heads, dim=1)
        return (weights.view(*weights.shape, *(1 for _ in stacked.shape[2:])) * stacked).sum(1)


def _require_features(gate: Gate, features: Tensor) -> None:
    if features.dim() < 2 or features.shape[1] != gate.linear.in_features:
        raise ObjectiveError(
            f"The gate takes features (N, {gate.linear.in_features}, ...), not {described(features)}.",
            hint="Channels are dimension 1; of tokens (N, L, C) pass features.transpose(1, 2).",
        )
    if gate.training and len(features) == 1:
        raise ObjectiveError(
            "The gate can't learn from a batch of one sample.",
            why="its batch norm normalises over the batch",
            hint="train with larger batches, or with a gate of your own",
        )
