"""Verify: the proof, on the user's own model."""

from __future__ import annotations

from torch import nn

from fxcollab.analysis.partition import partition
from fxcollab.plan import plan_of, training_model
from fxcollab.proof.gradients import check_gradients
from fxcollab.proof.outputs import check_outputs
from fxcollab.proof.report import Report
from fxcollab.proof.runs import Trial
from fxcollab.proof.structure import check_graphs, check_provenance, check_state
from fxcollab.tracing.capture import LIMITATIONS_KEY, capture
from fxcollab.tracing.examples import example_tensors, guess_inputs
from fxcollab.tracing.interface import ExampleInputs
from fxcollab.tracing.preserve import preserved


def verify(
    model: nn.Module, train_model: nn.Module, example_inputs: ExampleInputs | None = None, *, seed: int = 0
) -> Report:
    """Prove on this model that ``train_model`` computes and trains what it should, and prunes back to ``model``.

    1. The pruned graph equals the captured one node for node, for every head.
    2. The state dict equals it key for key, and the tensors are the same objects.
    3. Outputs are equal bit for bit, in train mode with gradients and in eval mode without: head 0, and every
       head h against the original that holds head h's weights.
    4. With the loss summed over heads, gradients follow the mean-gradient rule (equation 6) against H separate
       originals, in float64 where the model runs so.
    5. What capturing didn't preserve is listed.

    All runs are on copies of the state: weights, statistics, modes and the random state stay as they are.

    Args:
        model: the original, the same object that was transformed.
        train_model: what `transform` or `load` returned.
        example_inputs: tuple or dict of tensors. By default random ones of the shapes given to `transform`,
            or of the first usual shape that the model accepts.
        seed: for the random inputs and the random operations of the model.

    Returns:
        The report; it is true where every check holds.

    Raises:
        CaptureError: no inputs are given and none could be guessed.
        StateError: ``train_model`` is not a training model.
    """
    trained = training_model(train_model)
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
    intact = check_provenance(trained)
    if not intact.ok:  # without provenance nothing else can be checked
        return Report((intact,), limitations)
    cut = partition(captured, plan.tree)
    with preserved({*model.modules(), *trained.modules()}):  # forwards set attributes, such as weight norm's
        checks = (
            intact,
            *check_graphs(captured, trained),
            *check_state(model, cut, trained),
            *check_outputs(trial, cut.straddling),
            *check_gradients(trial),
        )
    return Report(checks, limitations)
