"""Random weights, as speed does not depend on their values: N / sqrt(fan in), scales near 1, biases small."""

import math
from typing import Any

import jax
import numpy as np

from sega_jax.checkpoint import flax_name
from sega_jax.parallel import Devices

# Drawn once: every parameter takes of these from another place on, over and over.
_POOL = 2**22 + 1


def filled(module: Any, dtype: str, devices: Devices) -> Any:
    """The module with values, in this dtype, on the devices."""
    pool = np.random.default_rng(0).standard_normal(_POOL, np.float32)
    leaves, structure = jax.tree.flatten_with_path(module)

    def value(number: int, path: Any, shape: tuple[int, ...]) -> np.ndarray:
        name = flax_name(path)
        if len(shape) == 1:
            mean, deviation = float(name.endswith("scale")), 0.1
        else:
            mean, deviation = 0.0, 1.0 if name.endswith("embedding") else 1 / math.sqrt(math.prod(shape[:-1]))
        few = np.roll(pool, 7919 * number)[: math.prod(shape)] * np.float32(deviation) + np.float32(mean)
        few = few.astype(jax.numpy.dtype(dtype))
        return np.resize(few, shape)

    values = [devices.place(value(i, path, leaf.shape)) for i, (path, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(structure, values)
