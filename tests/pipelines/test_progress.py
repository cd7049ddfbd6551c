"""Tests progress bars."""

import io
from types import SimpleNamespace

import pytest

from sega_jax.pipelines import progress
from sega_jax.pipelines.progress import counted, plainly, styled


@pytest.mark.parametrize("in_command", [True, False])
@pytest.mark.parametrize("delay", [0.0, 1000.0])
def test_long_work_of_commands_is_counted(monkeypatch, in_command, delay):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules={}))
    with styled(file=stream, delay=delay, mininterval=0):
        if in_command:
            with plainly():
                items = list(counted(range(3), "planning"))
        else:
            items = list(counted(range(3), "planning"))
    assert items == [0, 1, 2]
    assert ("planning" in stream.getvalue()) == (in_command and not delay)
