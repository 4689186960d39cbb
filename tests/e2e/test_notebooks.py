"""The notebooks, from top to bottom, in a kernel of their own."""

from pathlib import Path

import nbformat
import pytest

from tests.conftest import ROOT
from tests.e2e.notebooks import execute_notebook

pytestmark = pytest.mark.e2e


def pictures(notebook: nbformat.NotebookNode) -> int:
    """How many outputs are pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_strategies_are_compared_from_top_to_bottom() -> None:
    notebook = execute_notebook("compare_strategies.ipynb", SEEDS="1")
    assert pictures(notebook) == 6
    # Committed with its outputs: who reads it without running it sees as many pictures.
    committed = nbformat.read(Path(ROOT / "notebooks" / "compare_strategies.ipynb"), as_version=4)
    assert pictures(committed) == 6


def test_a_language_model_is_trained_from_top_to_bottom() -> None:
    notebook = execute_notebook("language.ipynb")
    committed = nbformat.read(Path(ROOT / "notebooks" / "language.ipynb"), as_version=4)
    assert pictures(notebook) == pictures(committed) == 1
