"""Calls that cannot fit in memory are refused before anything runs, and JAX's out-of-memory errors become
MemoryErrors."""

import jax
import pytest
from click.testing import CliRunner

from sega_jax import Edit
from sega_jax.cli.main import main
from sega_jax.pipelines.execution import chunks, memory
from sega_jax.pipelines.execution.memory import enough_memory

CALL = {"steps": 2, "progress": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 2**20, "width": 2**20}, r"1 pictures of 1048576x1048576 pixels take [\d,.]+ GiB without the"),
        ({"images_per_prompt": 2**16, "height": 80_000}, "make fewer or smaller pictures in each call"),
    ],
)
def test_pictures_that_cannot_fit_are_refused_at_once(pipe, options, message):
    for method in (pipe, pipe.prepare, pipe.compile):
        with pytest.raises(MemoryError, match=message):
            method("a cat", [Edit("hat")], **options, **CALL)


@pytest.mark.parametrize(
    "options", [["--height", "1048576", "--width", "1048576"], ["--images-per-prompt", "1000000000"]]
)
def test_the_shell(folder, tmp_path, options):
    words = ["edit", "--model", folder, "--prompt", "a cat", "--out", tmp_path, "--edit", "hat", *options]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_programs_that_cannot_fit_are_refused_before_they_run(pipe, monkeypatch):
    """The memory is enough for the pictures, but not for the network's activations."""
    monkeypatch.setattr(memory, "memory_of", lambda device: 200_000)
    monkeypatch.setattr(chunks, "_wait", lambda arrays: pytest.fail("ran"))
    with pytest.raises(MemoryError, match=r"a batch of shape \(2, \d+, \d+, \d+\) .* needs .* GiB to predict, but"):
        pipe(["a cat", "a dog"], **CALL)


def test_small_batches_are_not_analysed(pipe, monkeypatch):
    monkeypatch.setattr(memory, "check_programs", lambda *_: pytest.fail("analysed"))
    assert pipe("a cat", **CALL).finite.all()


ERRORS = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.",
    "INTERNAL: Failed to execute XLA Runtime executable: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "INTERNAL: Out of memory allocating 1024 bytes",
)


@pytest.mark.parametrize("text", ERRORS)
def test_errors_of_the_runtime(text):
    with pytest.raises(MemoryError, match="does not fit in the device's memory; reduce"), enough_memory((2, 8, 8, 4)):
        raise jax.errors.JaxRuntimeError(text)


def test_other_errors_are_unchanged():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: broken"), enough_memory((2, 8, 8, 4)):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")


def test_errors_that_appear_while_waiting(pipe, monkeypatch):
    def wait(arrays):
        raise jax.errors.JaxRuntimeError(ERRORS[2])

    monkeypatch.setattr(chunks, "_wait", wait)
    with pytest.raises(MemoryError, match="does not fit in the device's memory"):
        pipe("a cat", **CALL)
