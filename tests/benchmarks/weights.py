"""Random weights for benchmarks: normally distributed numbers divided by sqrt(fan-in), scales near 1, and small biases.
Speed does not depend on their values."""

import math
from typing import Any

import jax
import numpy as np

from sega_jax.pipelines.execution.devices import Devices
from sega_jax.weights.layout import flax_name

# These numbers are drawn once. Every parameter repeats them, starting at its own offset.
_POOL = 2**19 + 1


def filled(module: Any, dtype: str, devices: Devices) -> Any:
    """Returns the module, filled with random numbers of the given dtype on the given devices."""
    pool = np.tile(np.random.default_rng(0).standard_normal(_POOL, np.float32), 2)
    leaves, structure = jax.tree.flatten_with_path(module)

    def value(number: int, path: Any, shape: tuple[int, ...]) -> np.ndarray:
        name = flax_name(path)
        if len(shape) == 1:
            mean, deviation = float(name.endswith("scale")), 0.1
        else:
            mean, deviation = 0.0, 1.0 if name.endswith("embedding") else 1 / math.sqrt(math.prod(shape[:-1]))
        start = 7919 * number % _POOL
        values = pool[start : start + min(math.prod(shape), _POOL)] * np.float32(deviation) + np.float32(mean)
        return np.resize(values.astype(jax.numpy.dtype(dtype)), shape)

    values = [devices.place(value(i, path, leaf.shape)) for i, (path, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(structure, values)
