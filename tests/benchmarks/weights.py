"""Random weights, as speed does not depend on their values: N / sqrt(fan in), scales near 1, biases small."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sega_jax.checkpoint import flax_name
from sega_jax.parallel import Devices


@partial(jax.jit, static_argnames=("shape", "dtype", "mean", "deviation"))
def _draw(seed: int, shape: tuple[int, ...], dtype: str, mean: float, deviation: float) -> jax.Array:
    return (mean + deviation * jax.random.normal(jax.random.key(seed), shape, "float32")).astype(dtype)


def filled(module: Any, dtype: str, devices: Devices) -> Any:
    """The module with values, in this dtype, on the devices."""
    leaves, structure = jax.tree.flatten_with_path(module)

    def value(seed: int, path: Any, leaf: Any) -> jax.Array:
        if len(leaf.shape) == 1:
            return _draw(seed, leaf.shape, dtype, float(flax_name(path).endswith("scale")), 0.1)
        wide = flax_name(path).endswith("embedding")
        return _draw(seed, leaf.shape, dtype, 0.0, 1.0 if wide else 1 / math.sqrt(math.prod(leaf.shape[:-1])))

    values = [jnp.asarray(devices.place(value(i, path, leaf))) for i, (path, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(structure, values)
