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
        ok: whether it holds.
        detail: what was compared, or where it fails first.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """The whole proof; true where every check holds.

    Attributes:
        checks: the lines of the proof, in order.
        limitations: what capturing didn't preserve, one sentence each.
    """

    checks: tuple[Check, ...]
    limitations: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

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
            )
        return self

    def __str__(self) -> str:
        lines = [f"{'ok    ' if check.ok else 'FAILED'} {check.name}: {check.detail}" for check in self.checks]
        return "\n".join([*lines, *(f"note   {note}" for note in self.limitations)])
