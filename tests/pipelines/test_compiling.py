"""Tests the line that shows for how long programs have been compiling."""

import io
import threading
import time
from contextvars import copy_context
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sega_jax.pipelines import compiling, progress
from sega_jax.pipelines.progress import bar, plainly, styled


@pytest.fixture
def stderr(monkeypatch):
    """Makes standard error a terminal, and updates the line much more often than once a second."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(compiling, "_INTERVAL", 0.01)
    # pytest replaces sys.stderr after this fixture.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules={}))
    monkeypatch.setattr(compiling, "sys", SimpleNamespace(stderr=stream))
    with styled(file=stream):
        yield stream


def shows(stream, text):
    """Waits until a stream shows a text."""
    for _ in range(10_000):
        if text in stream.getvalue():
            return True
        time.sleep(0.001)
    return False


def program(stream, text="Compiling (0 s)"):
    """Returns a program that compiles until the stream shows a text."""

    @jax.jit
    def traced(x):
        assert shows(stream, text)
        return x + 1

    return traced


def now(stream):
    """Returns the visible line of a terminal."""
    return stream.getvalue().rpartition("\r")[2].rstrip()


def test_the_line_replaces_a_bar_that_has_not_moved(stderr):
    compiled = program(stderr)
    with styled(desc="seed 5"), bar(4, "call", None) as shown:
        compiled(np.ones(2))
        assert "seed 5: Compiling (0 s)" in stderr.getvalue().split("\r")
        shown.update(4)
    assert "4/4" in now(stderr)
    assert "Compiling" not in now(stderr)


def test_a_bar_that_has_moved_stays_visible(stderr):
    compiled = program(stderr)
    with bar(4, "call", None) as shown:
        shown.update(3)
        compiled(np.ones(2))
        assert any("Compiling (0 s):  75%" in line for line in stderr.getvalue().split("\r"))
    assert "75%" in now(stderr)
    assert "Compiling" not in now(stderr)


def test_seconds_are_added_up_until_the_bar_moves(stderr, monkeypatch):
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: clock[0])
    clock = [100.0]
    with bar(4, "call", None) as shown:
        for text, seconds in (("Compiling (2 s)", 2), ("Compiling (5 s)", 3)):

            @jax.jit
            def traced(x, text=text, seconds=seconds):
                clock[0] += seconds
                assert shows(stderr, text)
                return x + 1

            traced(np.ones(2))
            clock[0] += 50  # the program runs
        shown.update(1)

        @jax.jit
        def another(x):
            clock[0] += 4
            assert shows(stderr, "Compiling (4 s):  25%")
            return x + 1

        another(np.ones(2))


def test_compiled_programs_show_nothing(stderr, monkeypatch):
    compiled = jax.jit(lambda x: x + 1)
    compiled(np.ones(2))
    monkeypatch.setattr(compiling, "_INTERVAL", 0.0)
    with bar(1, "call", None) as shown:
        threads = threading.active_count()
        for _ in range(50):
            compiled(np.ones(2))
        assert threading.active_count() == threads
        shown.update(1)
    assert "Compiling" not in stderr.getvalue()


def test_threads_show_their_compilations_only_in_their_own_bar(stderr):
    compiled = program(stderr)
    with bar(1, "call", None):
        own = threading.Thread(target=copy_context().run, args=(compiled, np.ones(2)))
        own.start()
        own.join()
    assert stderr.getvalue().count("Compiling")
    before = stderr.getvalue().count("Compiling")
    with bar(1, "call", None):
        other = threading.Thread(target=jax.jit(lambda x: (time.sleep(0.1), x + 2)[1]), args=(np.ones(2),))
        other.start()
        other.join()
    assert stderr.getvalue().count("Compiling") == before


@pytest.mark.parametrize("given", [None, False])
def test_without_a_terminal_only_commands_write_a_line(stderr, monkeypatch, given):
    monkeypatch.setattr(stderr, "isatty", lambda: False)
    slow = jax.jit(lambda x: (time.sleep(0.1), x + 1)[1])
    with bar(1, "call", given):
        slow(np.ones(2))
    assert stderr.getvalue() == ""
    compiled = program(stderr, "Compiling\n") if given is None else slow
    with plainly(), bar(1, "call", given):
        compiled(np.ones(3))
        slow(np.ones(4))
    assert stderr.getvalue() == ("Compiling\n" if given is None else "")


def test_an_error_restores_the_bar(stderr):
    @jax.jit
    def fails(x):
        assert shows(stderr, "Compiling")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), bar(4, "call", None):
        fails(np.ones(2))
    assert "0/4" in now(stderr)
    assert "Compiling" not in now(stderr)
    assert "compiling" not in {thread.name for thread in threading.enumerate()}
