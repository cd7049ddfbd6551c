"""Warnings are collected during a call and emitted once each, at the line that called the library."""

import contextvars
import threading
import warnings
from pathlib import Path

import pytest

from sega_jax.pipelines import messages
from sega_jax.pipelines.messages import collected, muted, warn

PACKAGE = Path(messages.__file__).parents[1]
CODE = """
def deep(*words):
    for word in words:
        warn(word)

def call(*words):
    with collected():
        with collected():
            deep(*words)
        deep(*words)

def stop(*words):
    with collected():
        deep(*words)
        raise KeyError("broken")

def run(function, *words):
    function(*words)
"""


def module(path):
    """Returns the functions of an imaginary module at the given path."""
    space = {"collected": collected, "warn": warn}
    exec(compile(CODE, str(path), "exec"), space)
    return space


LIBRARY = module(PACKAGE / "pipelines" / "made_up.py")


@pytest.fixture
def caught():
    """Yields the list of all warnings in a test, including repeated ones."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def words(caught):
    return [str(one.message) for one in caught]


def line(words):
    """Returns the number of the only line in this file that consists of the given text."""
    (number,) = (i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.strip() == words)
    return number


def test_warnings_outside_of_blocks_are_emitted_at_once(caught):
    LIBRARY["deep"]("a", "a")
    assert words(caught) == ["a", "a"]
    assert caught[0].category is UserWarning
    assert {(one.filename, one.lineno) for one in caught} == {(__file__, line('LIBRARY["deep"]("a", "a")'))}


def test_a_block_emits_each_warning_once_at_its_end(caught):
    with collected():
        for word in "aba":
            warn(word)
        warn("a", RuntimeWarning)
        assert not caught
    assert words(caught) == ["a", "b", "a"]
    assert [one.category for one in caught] == [UserWarning, UserWarning, RuntimeWarning]


def test_the_outermost_block_emits(caught):
    with collected():
        LIBRARY["call"]("a")
        assert not caught
        LIBRARY["call"]("b", "a")
    assert words(caught) == ["a", "b"]


def test_every_call_emits_its_warnings(caught):
    for _ in range(2):
        LIBRARY["call"]("a", "b")
    assert words(caught) == ["a", "b"] * 2


def test_warnings_point_to_the_callers_line(caught):
    LIBRARY["run"](LIBRARY["call"], "a", "b")
    numbers = {one.lineno for one in caught}
    assert numbers == {line('LIBRARY["run"](LIBRARY["call"], "a", "b")')}
    assert {one.filename for one in caught} == {__file__}


def test_an_error_ends_the_block_and_emits_its_warnings(caught):
    with pytest.raises(KeyError, match="broken"):
        LIBRARY["stop"]("a", "b", "b")
    assert words(caught) == ["a", "b"]
    assert {(one.filename, one.lineno) for one in caught} == {(__file__, line('LIBRARY["stop"]("a", "b", "b")'))}
    LIBRARY["deep"]("c")
    assert words(caught)[2:] == ["c"], "the block has not ended"


def test_a_folder_with_a_similar_name_is_not_the_library(caught):
    path = PACKAGE.with_name(f"{PACKAGE.name}_experiments") / "run.py"
    module(path)["run"](LIBRARY["call"], "a")
    assert caught[0].filename == str(path)


def test_with_warnings_as_errors_the_first_error_is_the_context():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a") as raised:
            LIBRARY["stop"]("a")
        assert isinstance(raised.value.__context__, KeyError)
        with pytest.raises(UserWarning, match="b"):
            LIBRARY["call"]("b")


def in_threads(target, *arguments):
    """Runs a function in two threads, each in a copy of this thread's context."""
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(target, *arguments)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_in_a_copied_context_join_the_block(caught):
    with collected():
        in_threads(LIBRARY["call"], "a", "b")
        warn("b")
        assert not caught
    assert sorted(words(caught)) == ["a", "b"]
    assert {one.filename for one in caught} == {__file__}


def test_other_threads_emit_their_own_warnings(caught):
    thread = threading.Thread(target=LIBRARY["call"], args=("a",))
    with collected():
        thread.start()
        thread.join()
        assert words(caught) == ["a"]
    assert words(caught) == ["a"]


def test_a_muted_block_emits_nothing(caught):
    with collected():
        warn("a")
        with muted():
            LIBRARY["call"]("b")
        warn("c")
    with muted():
        warn("d")
    assert words(caught) == ["a", "c"]


def test_warnings_of_a_pipeline(small, caught):
    """A call that fails and a call that is only prepared each warn once, at the line of the call."""
    edits = ["a", "a"]
    with pytest.raises(ValueError, match="replay has shape"):
        small("cat", edits, steps=2, strict=False, replay=[[0.0]])
    small.prepare("cat", edits, steps=2)
    assert len(words(caught)) == 2
    assert all("'a' begins at warmup=10, after the last of 2 model calls" in word for word in words(caught))
    assert [one.filename for one in caught] == [__file__] * 2
    first = line('small("cat", edits, steps=2, strict=False, replay=[[0.0]])')
    assert [one.lineno for one in caught] == [first, line('small.prepare("cat", edits, steps=2)')]
