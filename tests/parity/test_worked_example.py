"""Runs the example parity test in `tests/README.md`."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.parity


def test_the_example_runs():
    page = Path(__file__).parents[1] / "README.md"
    [code] = [code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "def test_" in code]
    names = {"__name__": "example"}
    exec(compile(code, str(page), "exec"), names)
    names["test_group_norm"]()
