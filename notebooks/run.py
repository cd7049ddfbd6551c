"""Runs the guides and refreshes the outputs that are committed with them.

    python notebooks/run.py                        # all guides
    python notebooks/run.py sweeps quickstart      # these guides

Each guide runs in a fresh kernel, in an empty folder, on the CPU. Guides that use the demo model keep their outputs, so
that readers can see the pictures on GitHub. `WITHOUT_OUTPUTS` names the guides that need a published checkpoint: they
are cleaned but not run. Progress bars and execution times are never kept.

The command exits with status 1 if a guide fails, warns, or breaks a rule that `problems` checks. It needs
`pip install ".[test]"`. `tests/test_notebooks.py` runs every guide and checks the same rules.
"""

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
# These guides load published checkpoints, which are too large to run here. The tests run the guides on tiny random
# checkpoints.
WITHOUT_OUTPUTS = ("quickstart", "colab_tpu", "colab_sweep", "stable_diffusion_xl", "deepfloyd_and_paella")
MOST_BYTES = 1_500_000  # of a guide's file
MOST_PICTURE_BYTES = 150_000
_FOLDERS = "home|root|tmp|usr|opt|var|mnt|work|content|Users|private"
_ABSOLUTE_PATH = re.compile(rf"(?<![\w.:/<])(?:/(?:{_FOLDERS})/|[A-Z]:\\)[\w.]+")


def execute(notebook: nbformat.NotebookNode, folder: str | Path, timeout: int = 300) -> nbformat.NotebookNode:
    """Runs a notebook in a fresh kernel whose working directory is `folder`, and returns it with its outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    NotebookClient(notebook, timeout=timeout, kernel_name="python3").execute(cwd=str(folder))
    return notebook


def warnings(notebook: nbformat.NotebookNode) -> list[str]:
    """Returns the lines of a notebook's standard error that contain warnings.

    tqdm's warning that a kernel has no widgets for its progress bars is ignored.
    """
    texts = (output.text for output in _outputs(notebook) if output.get("name") == "stderr")
    lines = (line for text in texts for line in text.splitlines())
    return [line for line in lines if "Warning:" in line and "TqdmWarning" not in line]


def clean(notebook: nbformat.NotebookNode, outputs: bool) -> nbformat.NotebookNode:
    """Removes content that differs between runs, and also the outputs if `outputs` is False."""
    notebook.metadata = {
        **{name: notebook.metadata[name] for name in ("accelerator", "colab") if name in notebook.metadata},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.execution_count = None
            kept = [one for one in cell.outputs if outputs and one.get("name") != "stderr"]
            cell.outputs = _joined([_cleaned(output) for output in kept])
    return notebook


def problems(notebook: nbformat.NotebookNode, outputs: bool) -> list[str]:
    """Checks a notebook against the rules for committed guides, and returns a sentence for each broken rule."""
    if not outputs:
        return ["this guide should be committed without outputs"] if any(_outputs(notebook)) else []
    broken = []
    if (size := len(nbformat.writes(notebook))) > MOST_BYTES:
        broken.append(f"the guide is {size} bytes long; the maximum is {MOST_BYTES}")
    if not any(map(has_picture, notebook.cells)):
        broken.append("the guide shows no picture")
    for cell in notebook.cells:
        if cell.metadata:
            broken.append(f"{cell.id} has metadata: {dict(cell.metadata)}")
        for output in cell.get("outputs", []):
            if output.output_type == "error" or output.get("name") == "stderr":
                broken.append(f"{cell.id} shows an error, a warning or a progress bar")
            data = output.get("data", {"text/plain": output.get("text", "")})
            for path in _ABSOLUTE_PATH.findall(" ".join(text for kind, text in data.items() if kind != "image/png")):
                broken.append(f"{cell.id} shows an absolute path: {path}...")
            if len(base64.b64decode(data.get("image/png", ""))) > MOST_PICTURE_BYTES:
                broken.append(f"{cell.id} has a picture of more than {MOST_PICTURE_BYTES} bytes")
    return broken


def has_picture(cell: nbformat.NotebookNode) -> bool:
    """Returns whether a cell's outputs contain a picture."""
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _cleaned(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if "execution_count" in output:
        output.execution_count = None
    if "data" in output:
        output.metadata = {}
        # The output for a picture also contains a text description with the picture's memory address or size.
        keep = ("image/png",) if "image/png" in output.data else ("text/plain", "text/html", "text/markdown")
        output.data = {kind: value for kind, value in output.data.items() if kind in keep}
        if "image/png" in output.data:
            output.data["image/png"] = _smaller(output.data["image/png"])
    return output


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins consecutive pieces of printed text, because kernels split the text at arbitrary lines."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _smaller(png: str) -> str:
    """Reduces a picture to a palette of 256 colours, which makes its file much smaller."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        if image.mode == "P":
            return png
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def refresh(path: Path) -> list[str]:
    """Runs a guide, saves it, and returns its problems. A guide without outputs is only cleaned."""
    notebook = nbformat.read(path, as_version=4)
    outputs, lines = path.stem not in WITHOUT_OUTPUTS, []
    if outputs:
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        lines = warnings(notebook)
    clean(notebook, outputs)
    nbformat.write(notebook, path)
    return lines + problems(notebook, outputs)


def main(names: list[str]) -> int:
    """Refreshes the named guides, or all guides if no names are given, and returns the exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    paths = [FOLDER / f"{Path(name).stem}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb"))
    report = {path.stem: refresh(path) for path in paths}
    for name, sentences in report.items():
        print(f"{name}: {'; '.join(sentences) or 'fine'}")
    return int(any(report.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
