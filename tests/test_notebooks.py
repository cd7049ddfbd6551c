"""Checks that every guide runs from top to bottom, and that its committed outputs are clean and complete.

Guides that name published checkpoints load tiny random checkpoints with the same names from the cache that
`support/hub_cache.py` fills.
"""

import importlib.util
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
guides = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guides)


@pytest.mark.notebook
@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs(path, tmp_path, monkeypatch):
    if path.stem not in guides.WITHOUT_OUTPUTS:  # these guides make many pictures, so optimisation saves time
        monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    committed = nbformat.read(path, as_version=4)
    executed = guides.execute(nbformat.read(path, as_version=4), tmp_path)
    assert any(map(guides.has_picture, executed.cells)), "the guide shows no picture"
    if path.stem not in guides.WITHOUT_OUTPUTS:  # tiny checkpoints cause warnings, for example about truncated prompts
        assert guides.warnings(executed) == []
        for before, after in zip(committed.cells, executed.cells, strict=True):
            assert guides.has_picture(before) == guides.has_picture(after), f"run notebooks/run.py {path.stem}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_committed_outputs_are_clean(path):
    notebook, outputs = nbformat.read(path, as_version=4), path.stem not in guides.WITHOUT_OUTPUTS
    assert guides.problems(notebook, outputs) == []
    assert guides.clean(nbformat.read(path, as_version=4), outputs) == notebook, f"run notebooks/run.py {path.stem}"


def test_paths_of_this_machine_are_found(tmp_path):
    cell = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("stream", text=f"saved {tmp_path}/a.png")])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    assert any("absolute path" in sentence for sentence in guides.problems(notebook, outputs=True))


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[]), "error"),
        (nbformat.v4.new_output("stream", name="stderr", text="UserWarning: odd"), "warning"),
        (nbformat.v4.new_output("stream", text="no picture"), "no picture"),
    ],
)
def test_other_problems_are_found(output, problem):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
    assert any(problem in sentence for sentence in guides.problems(notebook, outputs=True))
