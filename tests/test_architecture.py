"""Checks that the architecture page's diagram is up to date and that the page's code runs."""

import re

import pytest
from support.architecture import PAGE, ROOT, with_diagram

from sega_jax.method.schedules.families import FAMILIES
from sega_jax.systems import registry


def test_the_diagram_is_current():
    text = PAGE.read_text()
    assert text == with_diagram(text), "run `python tests/support/architecture.py`"


def test_the_files_that_it_names_exist():
    named = re.findall(r"`((?:\w+/)+\w+\.\w+)`", PAGE.read_text())
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists() and not (ROOT.parent / name).exists()] == []


@pytest.mark.slow
@pytest.mark.usefixtures("one_by_default")
def test_its_code_runs(tmp_path, monkeypatch):
    """The code blocks run one after another in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {}
    try:
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(code, str(PAGE), "exec"), names)
    finally:
        registry.unregister("toy")
        FAMILIES.pop("AdamsBashforthScheduler", None)
    assert names["picture"].size == (8, 8)
