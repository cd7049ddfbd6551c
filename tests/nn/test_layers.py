"""Compares layers that use faster formulas with the layers' definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.nn import layers


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def filled(module, dtype, seed=7):
    leaves, structure = jax.tree.flatten(module)
    values = [jnp.asarray(noise(*leaf.shape, seed=seed + i) + 0.5, dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, values)


def error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def normalised(x, norm):
    """Computes group normalisation from its definition, in float64."""
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, norm.scale[...], norm.bias[...]))
    groups = x.reshape(len(x), -1, norm.groups, x.shape[-1] // norm.groups)
    centred = groups - groups.mean((1, 3), keepdims=True)
    normal = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + norm.eps)
    return normal.reshape(x.shape) * scale + bias


INPUTS = {
    "plain": lambda x: x,
    "large mean": lambda x: x + 50,
    "small values": lambda x: x / 1000,
    "different channels": lambda x: x + 20 * np.arange(x.shape[-1]),
    "outlier at the first position": lambda x: np.concatenate([x[:, :1] + 30, x[:, 1:]], 1),
}


# In half precision, the tolerance is about half a unit in the last digit; in float32, it allows for a few lost digits.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2.5e-3), ("float16", 4e-4)])
@pytest.mark.parametrize("kind", INPUTS)
def test_group_norm_is_its_definition(kind, dtype, tolerance):
    for shape in ((2, 6, 5, 12), (2, 7, 12)):
        norm = filled(layers.GroupNorm(3, 12, 1e-6), dtype)
        x = jnp.asarray(INPUTS[kind](noise(*shape)), dtype)
        shift = jnp.asarray(noise(2, 12, seed=1), dtype)
        moved = np.asarray(x, np.float64) + np.asarray(shift, np.float64).reshape(2, *(1,) * (x.ndim - 2), 12)
        for found, expected in ((norm(x), x), (norm(x, shift), moved)):
            assert found.dtype == x.dtype
            assert error(found, normalised(expected, norm)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-7), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("size", [None, (10, 14), (9, 14), (10, 13), (9, 13)])
def test_upsampling_equals_doubling_and_convolution(size, dtype, tolerance):
    layer = filled(layers.Upsample(6), dtype)
    plain = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layer.conv)
    x = jnp.asarray(noise(2, 5, 7, 6), dtype)
    height, width = size or (10, 14)
    doubled = layers.double(x.astype(jnp.float32))[:, :height, :width]
    found = layer(x) if size is None else layer(x, size)
    assert found.dtype == x.dtype
    assert error(found, np.asarray(plain(doubled), np.float64)) < tolerance
