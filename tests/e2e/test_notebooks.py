"""The notebooks, from top to bottom, in a kernel of their own."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

pytestmark = pytest.mark.e2e


def execute_notebook(name: str, **environment: str) -> nbformat.NotebookNode:
    """Run every cell where the notebook lies, for few epochs; an error in one of them is raised here."""
    notebook: nbformat.NotebookNode = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r'"epochs": \d+', '"epochs": 2', cell.source)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute(env=os.environ | environment)
    return notebook


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
