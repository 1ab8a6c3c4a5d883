"""The profile of a training model's original, or why there is none."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.profile import Profile, profile
from fxcollab.errors import CaptureError, one_line
from fxcollab.plan import plan_of
from fxcollab.rewriting.prune import prune
from fxcollab.tracing.examples import USUAL_IMAGES, guess_inputs, guesses
from fxcollab.tracing.interface import InputSpec, Interface


@dataclass(frozen=True, eq=False)
class ProfiledOriginal:
    """The original of a training model, profiled.

    Attributes:
        captured: the original, pruned from the training model.
        profile: of its train mode's graph; None where it can't be profiled.
        interface: the inputs on which it was profiled.
        guessed: whether these are a usual shape that fits, because none was given.
        unknown: why it can't be profiled, or None.
    """

    captured: CollabGraphModule
    profile: Profile | None
    interface: Interface
    guessed: bool
    unknown: str | None

    @property
    def inputs(self) -> str | None:
        """The inputs as text; None where nothing is known of them."""
        return ", ".join(map(_described, self.interface.inputs)) or None


def profile_original(train_model: CollabGraphModule) -> ProfiledOriginal:
    """Profile the original at the plan's inputs, or at guessed ones, if it runs on fake tensors."""
    captured, interface = prune(train_model), plan_of(train_model).interface
    guessed = not interface.known
    try:
        for guess in guesses(train_model.root, interface, USUAL_IMAGES) if guessed else ():
            with suppress(Exception):  # user code may raise anything on a wrong shape
                return ProfiledOriginal(captured, profile(captured, guess), guess, guessed, None)
        if guessed:
            interface = guess_inputs(train_model.root, USUAL_IMAGES)  # raises, and says why none fits
        return ProfiledOriginal(captured, profile(captured, interface), interface, guessed, None)
    except CaptureError as error:
        return ProfiledOriginal(captured, None, Interface(()), False, error.why)
    except Exception as error:  # user code may raise anything on a wrong shape
        why = f"a training step on this input fails: {one_line(error)}"
        return ProfiledOriginal(captured, None, interface, guessed, why)


def _described(spec: InputSpec) -> str:
    """``2x3x224x224``; with the type if that is not floating-point."""
    shape = "x".join(map(str, spec.shape or ())) or "scalar"
    return shape if spec.dtype is None or "float" in spec.dtype else f"{shape}:{spec.dtype}"
