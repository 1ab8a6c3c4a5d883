"""What a proof found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxcollab.errors import VerificationError


@dataclass(frozen=True)
class Check:
    """One line of the proof.

    Attributes:
        name: what is checked.
        ok: whether it holds; also true where it could not be checked.
        detail: what was compared, or where it fails first, or why it could not be checked.
        checked: False where there was nothing to compare with, as where the original itself raises an error.
    """

    name: str
    ok: bool
    detail: str
    checked: bool = True

    @classmethod
    def not_made(cls, name: str, why: str) -> Check:
        """A check that could not be made, which is no fault of the training model."""
        return cls(name, True, f"not checked: {why}", checked=False)


@dataclass(frozen=True)
class Report:
    """The whole proof; true where no check fails.

    Attributes:
        checks: the lines of the proof, in order.
        limitations: what capturing didn't preserve, one sentence each.
    """

    checks: tuple[Check, ...]
    limitations: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check holds that could be made."""
        return all(check.ok for check in self.checks)

    @property
    def not_checked(self) -> tuple[Check, ...]:
        """The checks that could not be made, such as those of values on the meta device."""
        return tuple(check for check in self.checks if not check.checked)

    def __bool__(self) -> bool:
        return self.ok

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def raise_if_failed(self) -> Report:
        """Return the report.

        Raises:
            VerificationError: a check failed; it names all that did.
        """
        failed = [check for check in self.checks if not check.ok]
        if failed:
            raise VerificationError(
                f"{len(failed)} of {len(self.checks)} checks failed.",
                why="; ".join(f"{check.name}: {check.detail}" for check in failed),
                hint="the first that fails says most: the others may follow from it",
            )
        return self

    def __str__(self) -> str:
        marks = {True: "ok    ", False: "FAILED"}
        lines = [f"{marks[c.ok] if c.checked else '-     '} {c.name}: {c.detail}" for c in self.checks]
        return "\n".join([*lines, *(f"note   {note}" for note in self.limitations)])
