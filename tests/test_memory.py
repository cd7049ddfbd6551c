"""Calls that take less memory: rows whose predictions are made in parts, pictures that are decoded in tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sega_jax import Edit
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems import base

PROMPTS = ["cat", "dog", "hat", "a", "b"]
CALL = {"edits": [Edit("c", warmup=0)], "steps": 3, "output": "latent", "record": True}


def temporary(program, *args):
    return jax.jit(program).lower(*args).compile().memory_analysis().temp_size_in_bytes


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)


def test_parts_of_the_rows_are_the_rows(small):
    """Five rows in parts of two, the last of which is filled up."""
    whole, parts = (small(PROMPTS, rows_at_once=most, **CALL) for most in (5, 2))
    assert relative(parts.record.cond[:, 0], whole.record.cond[:, 0]) < 1e-5
    assert relative(parts.record.edits[:, 0], whole.record.edits[:, 0]) < 1e-5
    assert relative(parts.images, whole.images) < 3e-4


def test_parts_take_less_memory(small):
    call = {"edits": [Edit("c", warmup=0)], "steps": 3, "output": "latent", "height": 64, "width": 64}
    whole, parts = (small.compile(["cat"] * 8, rows_at_once=most, **call) for most in (8, 1))

    def memory(compiled):
        return next(program.memory for program in compiled.programs if program.name == "advance")

    assert memory(parts) < memory(whole) / 3


@pytest.mark.parametrize("most", [None, 1, 2, 3, 4, 5])
def test_rows_and_their_branches_stay_together(most):
    """Two arrays of rows, one of three branches of each, and nothing."""
    x, y, texts = np.arange(10).reshape(5, 2), np.arange(5), np.arange(30).reshape(15, 2)

    def function(x, y, texts, nothing):
        assert nothing is None
        return x + y[:, None], texts.reshape(len(x), 3, 2).sum(1), None

    a, b, nothing = base.in_parts(function, most, jnp.asarray(x), jnp.asarray(y), jnp.asarray(texts), None)
    np.testing.assert_array_equal(a, x + y[:, None])
    np.testing.assert_array_equal(b, texts.reshape(5, 3, 2).sum(1))
    assert nothing is None


def test_tiles_take_less_memory():
    net = tiny.filled(AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE)))
    latents = np.random.default_rng(0).standard_normal((1, 32, 32, 4)).astype(np.float32)
    whole, tiled = (temporary(lambda net, x, tile=tile: net.decode(x, tile), net, latents) for tile in (None, 8))
    assert tiled < whole / 3


def test_what_fits_in_a_tile_is_not_tiled(small):
    call = {"steps": 1, "output": "float"}
    usual = small("cat", **call).images
    assert np.array_equal(small("cat", tiled=True, **call).images, usual)
    tiled = small("cat", tiled=8, **call).images
    assert 1e-4 < relative(tiled, usual) < 1


def test_a_tile_in_the_middle_is_the_decoders_own():
    """Where no other tile reaches, and over the seams something of both."""
    net = tiny.filled(AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE_1)))
    latents = np.random.default_rng(0).standard_normal((1, 8, 20, 4)).astype(np.float32)
    found = np.asarray(net.decode(latents, 8))[:, :6]
    left, right = (np.asarray(net.decode(latents[:, :, at : at + 8]))[:, :6] for at in (0, 6))
    np.testing.assert_allclose(found[:, :, :6], left[:, :, :6], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 8:12], right[:, :, 2:6], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 6], left[:, :, 6], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 7], (left[:, :, 7] + right[:, :, 1]) / 2, atol=1e-5)
