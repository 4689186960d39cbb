"""The notebooks of the repository, in a kernel of their own."""

import os
import re

import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT


def execute_notebook(name: str, **environment: str) -> nbformat.NotebookNode:
    """Run every cell where the notebook lies, for few epochs of short texts.

    Errors of cells are raised here.
    """
    notebook: nbformat.NotebookNode = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r'"epochs": \d+', '"epochs": 2', cell.source)
        cell.source = cell.source.replace("[:50_000]", "[:10_000]")
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    client.execute(env=os.environ | environment)
    return notebook
