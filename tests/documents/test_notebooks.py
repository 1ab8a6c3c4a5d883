"""The notebooks run, print what they show, and draw the diff inside them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.documents.reading import GUIDES, ROOT

NOTEBOOKS = ("first-model.ipynb", "reading-the-proof.ipynb")


def printed(notebook: Any) -> list[str]:
    return ["".join(o.text for o in cell.outputs if o.output_type == "stream") for cell in code_of(notebook)]


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_shows_the_diff(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(GUIDES / name, 4)
    shown = printed(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert printed(notebook) == shown
    kinds = [set(output.get("data", ())) for cell in code_of(notebook) for output in cell.outputs]
    assert {"image/svg+xml"} in kinds and {"text/html"} in kinds


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_with_its_picture_and_without_the_page(name: str) -> None:
    text = (GUIDES / name).read_text()
    assert "image/svg+xml" in text and "<iframe" not in text
    assert len(text) < 60_000
