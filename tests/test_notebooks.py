"""Every notebook runs from top to bottom, on a small checkpoint."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.notebook
@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs(path, small_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGA_JAX_MODEL", os.environ.get("SEGA_JAX_NOTEBOOK_MODEL", str(small_folder)))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=tmp_path)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells), "commit without outputs"
