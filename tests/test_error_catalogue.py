"""The catalogue of errors: every kind has a code, and the page says what its examples say."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxcollab
from fxcollab import errors
from tests.error_catalogue import EXAMPLES, example, kinds, page

PAGE = Path(__file__).parents[1] / "samples" / "errors.md"


def test_every_kind_of_error_has_a_code_of_its_own_a_cause_and_a_remedy() -> None:
    found = list(kinds())
    assert [kind.code for kind in found] == [f"FXC{number:03}" for number in range(len(found))]
    assert all(kind.__doc__ and "remedy" in vars(kind) and kind.__name__ in vars(errors) for kind in found)
    assert set(EXAMPLES) == {kind.code for kind in found} - {"FXC000"}


def test_a_subclass_elsewhere_has_the_code_of_its_kind() -> None:
    class Own(fxcollab.CaptureError):
        """Somebody's."""

    assert Own("x").code == fxcollab.CaptureError.code


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_page_says_what_the_example_of_a_code_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    said = example(code).strip()
    assert f"code: {code}" in said or said.startswith("fxcollab.errors.")
    assert f"\n{said}\n```" in PAGE.read_text()


def test_the_page_is_made_from_the_classes() -> None:
    written = PAGE.read_text().split("```")
    made = page(dict.fromkeys(EXAMPLES, "")).split("```")
    assert written[::2] == made[::2]
