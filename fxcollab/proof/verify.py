"""Verify: the proof, on the user's own model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from fxcollab.analysis.partition import partition
from fxcollab.arguments import checked
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.distributed.spread import spread_of
from fxcollab.errors import SplitError
from fxcollab.functional import tensors_of
from fxcollab.limits import check_seed
from fxcollab.plan import plan_of, training_model
from fxcollab.proof.across_ranks import verify_part
from fxcollab.proof.gradients import check_gradients
from fxcollab.proof.outputs import check_outputs
from fxcollab.proof.report import Check, Report
from fxcollab.proof.runs import Trial
from fxcollab.proof.steps import STEPS, check_steps
from fxcollab.proof.structure import check_graphs, check_provenance, check_state
from fxcollab.tracing.capture import LIMITATIONS_KEY, capture
from fxcollab.tracing.examples import example_tensors, guess_inputs
from fxcollab.tracing.interface import ExampleInputs
from fxcollab.tracing.twin import preserved_classes


@checked
def verify(
    model: nn.Module,
    train_model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    seed: int = 0,
    on_check: Callable[[Check], object] = lambda check: None,
) -> Report:
    """Prove on this model that ``train_model`` computes and trains what it should, and prunes back to ``model``.

    1. The pruned graph equals the captured one node for node, for every head.
    2. The state dict equals it key for key, and the tensors are the same objects.
    3. Outputs are equal bit for bit, in train mode with gradients and in eval mode without: head 0, and every
       head h against the original that holds head h's weights; and eval mode returns what the original does.
    4. The same holds after a few training steps: nothing that was computed from weights was frozen at capture.
    5. With the loss summed over heads, gradients follow the mean-gradient rule (equation 6) against H separate
       originals, in float64 where the model runs so.
    6. What capturing didn't preserve is listed.

    All runs are on copies: weights, statistics, attributes, modes and the random state stay as they are, and other
    threads may use the models meanwhile. Hooks on parameters are not called, so that gradients are compared as they
    are before those. Where the original itself raises an error or computes NaN, or has no values
    on the meta device, the report says what could not be checked.

    Of a part of a training model, on all ranks at once, the gradients are compared with those of one process: try a
    recipe for many ranks on a small model.

    Args:
        model: the original, the same object that was transformed; for a part the whole training model, any weights.
        train_model: what `transform` or `load` returned; or `spread`, sharded and wrapped as for training.
        example_inputs: tuple or dict of tensors; for a part a batch of this rank's.
            By default random ones of the shapes given to `transform`,
            or of the first usual shape that the model accepts.
        seed: for the random inputs and the random operations of the model (default 0).
        on_check: called with every check as soon as it is made (default: nothing).

    Returns:
        The report; it is true where every check holds that could be made, and false where the original runs on these
        inputs in neither mode.

    Raises:
        CaptureError: no inputs are given and none could be guessed, or the model fails on the given ones.
        StateError: ``train_model`` is not a training model.
    """
    if found := spread_of(train_model):
        return verify_part(training_model(model), train_model, found, example_inputs)
    trained, seed = training_model(train_model), check_seed(seed)
    plan = plan_of(trained)
    captured = capture(model, plan.tree.splits, example_inputs, plan.granularity, interface=plan.interface)
    interface = plan.interface
    if example_inputs is not None:
        inputs = interface.values_of(model, example_inputs)
    else:
        known = interface if interface.known else guess_inputs(model, known=interface)
        inputs = tuple(example_tensors(model, known, seed))
    trial = Trial(model, trained, interface, inputs, seed)
    limitations = tuple(trained.meta.get(LIMITATIONS_KEY, ()))
    checks = []
    with preserved_classes(model):  # which copies share
        for check in _checks(model, captured, trial):
            on_check(check)
            checks.append(check)
    return Report(tuple(checks), limitations)


def _checks(model: nn.Module, captured: CollabGraphModule, trial: Trial) -> Iterator[Check]:
    trained = trial.train_model
    intact = check_provenance(trained)
    yield intact
    if not intact.ok:  # without provenance nothing else can be checked
        return
    try:
        cut = partition(captured, plan_of(trained).tree)
    except SplitError as error:  # these inputs show what the transform's couldn't
        yield Check("the model can be split so", False, f"{error.what} {error.why}")
        return
    yield from check_graphs(captured, trained)
    yield from check_state(model, cut, trained)
    yield from _check_values(trial, cut.straddling)


def _check_values(trial: Trial, straddling: frozenset[str]) -> Iterator[Check]:
    if any(tensor.is_meta for tensor in tensors_of(trial.train_model).values()):
        for what in ("outputs", f"outputs after {STEPS} training steps", "gradients"):
            yield Check.not_made(
                f"{what} equal those of separate originals", "the model is on meta and has no values"
            )
        return
    outputs = tuple(check_outputs(trial, straddling))
    yield from outputs
    yield from check_steps(trial, straddling, all(check.ok for check in outputs))
    yield check_gradients(trial)
