"""Initial values, half precision and attention of the networks that the recipes train."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sega_jax.nn.layers import Embed
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.loading import pick_attention
from sega_jax.weights.layout import flax_name

# The convolutions and projections that end a residual branch start at zero, so that the branch starts as the identity.
_ENDS = ("conv2.kernel", "proj_out.kernel", "to_out.0.kernel", "ff.net.2.kernel", "fc2.kernel", "out_proj.kernel")


def initial(module: Any, key: jax.Array, zero: tuple[str, ...] = _ENDS) -> Any:
    """Returns the module with random values: kernels N(0, 1 / fan in), embeddings N(0, 0.02²), scales 1, biases 0.

    zero: endings of the names of further parameters that start at zero.
    """
    leaves = jax.tree_util.tree_leaves_with_path(module)

    def value(path, leaf, key):
        name = flax_name(path)
        if name.endswith("scale"):
            return jnp.ones(leaf.shape)
        if name.endswith("bias") or name.endswith(zero):
            return jnp.zeros(leaf.shape)
        deviation = 0.02 if name.endswith("embedding") else 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        return deviation * jax.random.truncated_normal(key, -2, 2, leaf.shape)

    @jax.jit
    def values(key):
        keys = jax.random.split(key, len(leaves))
        return [value(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]

    return jax.tree.unflatten(jax.tree.structure(module), values(key))


def half(module: Any) -> Any:
    """Casts the module to bfloat16, but on a CPU, which would be slower in it, leaves it as it is."""
    return module if jax.default_backend() == "cpu" else jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), module)


def attention() -> str:
    """Names the fastest attention of this machine's devices in bfloat16."""
    return pick_attention(None, jnp.dtype(jnp.bfloat16), Devices())


class OneHot(Embed):
    """Computes the lookup of an embedding as a matrix product, which is faster to train.

    The gradient of the product is a sum of rows, which GPUs compute in parallel. The gradient of a lookup is a scatter,
    in which the many padding tokens wait for each other.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.embedding[...]
        return jax.nn.one_hot(ids, len(table), dtype=table.dtype) @ table
