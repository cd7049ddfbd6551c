"""Calls that save memory: predicting a few rows at a time, and decoding pictures in tiles."""

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax import Edit
from sega_jax.systems.diffusion import in_chunks

PROMPTS = ["cat", "dog", "hat", "a", "b"]
CALL = {"edits": [Edit("c", warmup=0)], "steps": 3, "output": "latent", "record": True}


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)


@pytest.mark.slow
def test_predicting_rows_in_chunks_changes_nothing(small):
    """Five rows run in chunks of two, the last of which is padded."""
    whole, parts = (small(PROMPTS, rows_at_once=most, **CALL) for most in (5, 2))
    assert relative(parts.record.cond[:, 0], whole.record.cond[:, 0]) < 1e-5
    assert relative(parts.record.edits[:, 0], whole.record.edits[:, 0]) < 1e-5
    assert relative(parts.images, whole.images) < 3e-4


@pytest.mark.slow
def test_chunks_need_less_memory(small):
    call = {"edits": [Edit("c", warmup=0)], "steps": 3, "output": "latent", "height": 64, "width": 64}
    whole, parts = (small.compile(["cat"] * 8, rows_at_once=most, **call) for most in (8, 1))

    def memory(compiled):
        return next(program.memory for program in compiled.programs if program.name == "advance")

    assert memory(parts) < memory(whole) / 3


@pytest.mark.parametrize("most", [None, 1, 2, 3, 4, 5])
def test_chunks_keep_rows_and_their_branches_together(most):
    """The arguments are two arrays of rows, an array with three branches for each row, and None."""
    x, y, texts = np.arange(10).reshape(5, 2), np.arange(5), np.arange(30).reshape(15, 2)

    def function(x, y, texts, nothing):
        assert nothing is None
        return x + y[:, None], texts.reshape(len(x), 3, 2).sum(1), None

    a, b, nothing = in_chunks(function, most, jnp.asarray(x), jnp.asarray(y), jnp.asarray(texts), None)
    np.testing.assert_array_equal(a, x + y[:, None])
    np.testing.assert_array_equal(b, texts.reshape(5, 3, 2).sum(1))
    assert nothing is None


@pytest.mark.slow
def test_pictures_within_one_tile_are_not_tiled(small):
    call = {"steps": 1, "output": "float"}
    untiled = small("cat", **call).images
    assert np.array_equal(small("cat", tiled=True, **call).images, untiled)
    tiled = small("cat", tiled=8, **call).images
    assert 1e-4 < relative(tiled, untiled) < 1
