"""Check 4: the training model follows its weights, which a constant made of them at capture doesn't."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fxcollab.proof.gradients import backward, largest
from fxcollab.proof.outputs import check_head
from fxcollab.proof.report import Check
from fxcollab.proof.runs import Trial, attempt, call, run_train_model, undisturbed

STEPS = 3
_RATE = 0.01


def check_steps(trial: Trial, straddling: frozenset[str], sound: bool) -> Iterator[Check]:
    """A copy trains a few steps, then every head equals the original with its weights again, bit for bit.

    In both modes where their graphs differ. Unless ``sound``, outputs differ before any step.
    """
    if not sound:
        yield Check.not_made(
            f"after {STEPS} training steps every head equals an original", "a check before this failed"
        )
        return
    with undisturbed(), torch.enable_grad():
        trained = trial.copied()
        moved = attempt(_train, trained)
        own = attempt(_original_backward, trial) if isinstance(moved, str) else {}
    for training in (True, False) if trial.train_model.modes.differ else (False,):
        mode = "train" if training else "eval"
        name = f"after {STEPS} training steps every head in {mode} mode equals an original with its weights"
        if isinstance(own, str):
            yield Check.not_made(name, f"the original itself raises {own}")
        elif isinstance(moved, str):
            yield Check(name, False, f"a training step raises {moved}")
        else:
            with undisturbed(), torch.set_grad_enabled(training):
                yield _check_heads(trained, training, straddling, name, moved)


def _train(trial: Trial) -> int:
    """Train the trial's own training model; the number of tensors that moved.

    A step of gradient descent moves every parameter by the same share of its size, so that all of them can be seen.
    """
    model = trial.train_model.train()
    parameters = dict(model.named_parameters())
    moved = set[str]()
    for _ in range(STEPS):
        gradients = backward(trial, lambda *values: call(trial, model, values), parameters)
        for name, gradient in gradients.items():
            if 0 < (size := largest(gradient)) < torch.inf:
                own = parameters[name].detach()
                own.sub_(gradient, alpha=_RATE * (largest(own) or 1) / size)
                moved.add(name)
    return len(moved)


def _original_backward(trial: Trial) -> object:
    model = trial.original(0, True)
    return backward(trial, lambda *values: [call(trial, model, values)], dict(model.named_parameters()))


def _check_heads(trial: Trial, training: bool, straddling: frozenset[str], name: str, moved: int) -> Check:
    found = attempt(run_train_model, trial, training)
    for head in range(trial.tree.heads):
        check = check_head(trial, found, head, training, straddling, name)
        if not check.ok:
            why = "what was computed from weights at capture doesn't follow them"
            return Check(name, False, f"head {head}: {check.detail}; {why}" if moved else check.detail)
        if not check.checked:
            return check
    return Check(name, True, f"bit for bit; {moved} tensors of parameters have moved")
