"""Check 3: outputs, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcollab._torch import pytree
from fxcollab.contents import tensors_in, without_objects
from fxcollab.functional import bits_of
from fxcollab.plan import plan_of
from fxcollab.proof.report import Check
from fxcollab.proof.runs import (
    Run,
    Trial,
    attempt,
    run,
    run_train_model,
    undisturbed,
)
from fxcollab.rewriting.eval_output import mean_of_heads


def check_outputs(trial: Trial, straddling: frozenset[str]) -> Iterator[Check]:
    """Every head against the original with this head's weights: in train mode with gradients, in eval mode without.

    Buffers are compared after the call, except ``straddling`` ones: what trunk and branches share is updated by each.
    Where the original runs in neither mode nothing is proved, and a check says so.
    """
    heads: list[Check] = []
    for training in (True, False):
        mode = "train" if training else "eval"
        with undisturbed(), torch.set_grad_enabled(training):
            found = attempt(run_train_model, trial, training)
            for head in range(trial.tree.heads):
                what = "the original" + (f" with head {head}'s weights" if head or not trial.is_own else "")
                name = f"head {head} in {mode} mode equals {what}"
                heads.append(check_head(trial, found, head, training, straddling, name))
                yield heads[-1]
            if isinstance(found, Run):
                where = "; ".join(found.hazards[:2])
                name = f"no branch writes into what another one reads in {mode} mode"
                yield Check(name, not where, where or "by the tensors' versions")
                yield _check_generated_code(
                    trial, found, training, f"the generated forward runs the graph in {mode} mode"
                )
                if not training:
                    yield from _check_eval_output(trial, found)
    if not any(check.checked for check in heads):
        yield Check(
            "the original runs on these inputs",
            False,
            "it raises an error in both modes, and no values were compared: give inputs that it takes (--input)",
        )


def check_head(
    trial: Trial, found: Run | str, head: int, training: bool, straddling: frozenset[str], name: str
) -> Check:
    """One head of ``found``, a run of the training model or its error, against the original."""
    attributes = found.attributes if isinstance(found, Run) else frozenset()
    expected = attempt(lambda: run(trial, trial.original(head, training, attributes)))
    if isinstance(expected, str):
        return Check.not_made(name, f"the original itself raises {expected}")
    if isinstance(found, str):
        return Check(name, False, f"the training model raises {found}")
    difference = _bits_differ(found.output[head], expected.output)
    for own, key in trial.keys_of(head).items():
        if difference is None and own not in straddling:
            state = _bits_differ(found.state[key], expected.state[own])
            difference = state and f"the call leaves another {own}: {state}"
    nan = any(bool(leaf.isnan().any()) for leaf in tensors_in(expected.output))
    same = "bit for bit, of which some are NaN: the original computes them too" if nan else "bit for bit"
    return Check(name, difference is None, difference or same)


def _check_generated_code(trial: Trial, found: Run, training: bool, name: str) -> Check:
    graph = attempt(run_train_model, trial, training, together=False) if found.draws else found
    generated = attempt(lambda: run(trial, trial.trained(training)))
    if isinstance(graph, str) or isinstance(generated, str):
        raised = [one for one in (graph, generated) if isinstance(one, str)]
        return Check(name, False, f"it raises {raised[0]}")
    difference = _bits_differ(generated.output, graph.output)
    return Check(name, difference is None, difference or "bit for bit")


def _check_eval_output(trial: Trial, found: Run) -> Iterator[Check]:
    """What eval mode returns where that is not one output a head."""
    eval_output = plan_of(trial.train_model).options.eval_output
    if eval_output == "all":
        return
    name = f"eval mode returns the {'mean over heads' if eval_output == 'mean' else 'output of the original'}"
    model = trial.copied().train_model.eval()
    one = attempt(lambda: run(trial, model))
    if eval_output == "mean":
        expected = attempt(lambda: mean_of_heads(found.output))
    else:
        original = attempt(lambda: run(trial, trial.original(0, False)))
        expected = original.output if isinstance(original, Run) else original
    if isinstance(expected, str):
        yield Check.not_made(name, f"the original itself raises {expected}")
    elif isinstance(one, str):
        yield Check(name, False, f"it raises {one}")
    else:
        difference = _bits_differ(one.output, expected)
        yield Check(name, difference is None, difference or "bit for bit")


def _bits_differ(one: Any, other: Any) -> str | None:
    """How two output structures differ, as text; None where they are equal bit for bit."""
    one, other = without_objects(one), without_objects(other)
    left, right = pytree.tree_flatten(one), pytree.tree_flatten(other)
    if type(one) is not type(other) or left[1] != right[1]:
        return f"{type(one).__qualname__} and {type(other).__qualname__} have different structures"
    for index, (a, b) in enumerate(zip(left[0], right[0], strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if not _are_equal(a, b):
                return f"output {index}: {a} and {b}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(bits_of(a), bits_of(b)):
            a, b = (tensor.detach().cpu().to(torch.complex128) for tensor in (a, b))  # booleans can't be subtracted
            return f"output {index} differs by up to {float((a - b).abs().max()):.1e}"
    return None


def _are_equal(one: Any, other: Any) -> bool:
    """Whether values that are no tensors are equal; arrays of numpy by all they have, and nan equals nan."""
    same = one == other
    if hasattr(same, "all"):
        return bool(same.all()) and one.shape == other.shape
    return bool(same) or bool(one != one and other != other)
