"""Check 3: outputs, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcollab._torch import pytree
from fxcollab.proof.report import Check
from fxcollab.proof.runs import (
    Run,
    Trial,
    call,
    copies,
    run_original,
    run_train_model,
    state_of_head,
    undisturbed,
    without_dataclasses,
)
from fxcollab.rng import seeded


def check_outputs(trial: Trial, straddling: frozenset[str]) -> Iterator[Check]:
    """Every head against the original with this head's weights: in train mode with gradients, in eval mode without.

    Buffers are compared after the call, except ``straddling`` ones: what trunk and branches share is updated by each.
    """
    for training in (True, False):
        with trial.train_model.in_mode(training), undisturbed(), torch.set_grad_enabled(training):
            run = run_train_model(trial, copies(trial.train_model))
            for head in range(trial.tree.heads):
                yield _check_head(trial, run, head, training, straddling)
            yield _check_generated_code(trial, "train" if training else "eval")


def _check_head(trial: Trial, run: Run, head: int, training: bool, straddling: frozenset[str]) -> Check:
    expected = run_original(trial, state_of_head(trial, copies(trial.train_model), head))
    difference = _bits_differ(run.output[head], expected.output)
    left = state_of_head(trial, run.state, head)
    for name, buffer in expected.state.items():
        if difference is None and name not in straddling:
            found = _bits_differ(left[name], buffer)
            difference = found and f"the call leaves another {name}: {found}"
    what = "the original" if head == 0 else f"the original with head {head}'s weights"
    mode = "train" if training else "eval"
    return Check(f"head {head} in {mode} mode equals {what}", difference is None, difference or "bit for bit")


def _check_generated_code(trial: Trial, mode: str) -> Check:
    outputs = run_train_model(trial, copies(trial.train_model), together=False).output
    with seeded(trial.seed):
        generated = call(trial, trial.train_model, copies(trial.train_model))
    difference = _bits_differ(generated, outputs)
    name = f"the generated forward runs the graph in {mode} mode"
    return Check(name, difference is None, difference or "bit for bit")


def _bits_differ(one: Any, other: Any) -> str | None:
    """How two output structures differ, as text; None where they are equal bit for bit."""
    one, other = without_dataclasses(one), without_dataclasses(other)
    left, right = pytree.tree_flatten(one), pytree.tree_flatten(other)
    if type(one) is not type(other) or left[1] != right[1]:
        return f"{type(one).__qualname__} and {type(other).__qualname__} have different structures"
    for index, (a, b) in enumerate(zip(left[0], right[0], strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a != b:
                return f"output {index}: {a} and {b}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(_bytes(a), _bytes(b)):
            a, b = (tensor.detach().cpu().to(torch.complex128) for tensor in (a, b))  # booleans can't be subtracted
            return f"output {index} differs by up to {float((a - b).abs().max()):.1e}"
    return None


def _bytes(tensor: Tensor) -> Tensor:
    resolved = tensor.detach().resolve_conj().resolve_neg()  # lazily conjugated tensors have other bytes
    return resolved.contiguous().flatten().view(torch.uint8)
