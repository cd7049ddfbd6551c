"""Tests decoding in tiles: memory use, and the pixels inside tiles and in their overlaps."""

import jax
import numpy as np
import pytest
from support import tiny

from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL


def temporary(program, *args):
    return jax.jit(program).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_tiles_take_less_memory():
    net = tiny.filled(AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE)))
    latents = np.random.default_rng(0).standard_normal((1, 32, 32, 4)).astype(np.float32)
    at_once, tiled = (temporary(lambda net, x, tile=tile: net.decode(x, tile), net, latents) for tile in (None, 8))
    assert tiled < at_once / 3


@pytest.mark.slow
def test_tiles_are_blended_only_where_they_overlap():
    """Elsewhere, a pixel equals the result of decoding its tile alone."""
    net = tiny.filled(AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE_1)))
    latents = np.random.default_rng(0).standard_normal((1, 8, 20, 4)).astype(np.float32)
    found = np.asarray(net.decode(latents, 8))[:, :6]
    left, right = (np.asarray(net.decode(latents[:, :, at : at + 8]))[:, :6] for at in (0, 6))
    np.testing.assert_allclose(found[:, :, :6], left[:, :, :6], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 8:12], right[:, :, 2:6], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 6], left[:, :, 6], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 7], (left[:, :, 7] + right[:, :, 1]) / 2, atol=1e-5)
