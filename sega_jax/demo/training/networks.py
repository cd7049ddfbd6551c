"""Chooses initial values, precision and the attention implementation for the networks that the recipes train."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sega_jax.nn.layers import Embed
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.loading import pick_attention
from sega_jax.weights.layout import flax_name

# The last convolutions and projections of residual branches start at zero, so that the blocks start as the identity.
_ENDS = ("conv2.kernel", "proj_out.kernel", "to_out.0.kernel", "ff.net.2.kernel", "fc2.kernel", "out_proj.kernel")


def initial(module: Any, key: jax.Array, zero: tuple[str, ...] = _ENDS) -> Any:
    """Returns the module with initial parameters: kernels N(0, 1 / fan in), embeddings N(0, 0.02²), scales 1, biases 0.

    Args:
        module: the module; only the shapes of its parameters are used.
        key: the random key.
        zero: the name suffixes of parameters that start at zero, in addition to biases.
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
    """Casts the module to bfloat16. On a CPU, where bfloat16 is slower, it returns the module unchanged."""
    return module if jax.default_backend() == "cpu" else jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), module)


def attention() -> str:
    """Returns the name of the attention implementation that is fastest in bfloat16 on this machine's devices."""
    return pick_attention(None, jnp.dtype(jnp.bfloat16), Devices())


class OneHot(Embed):
    """An embedding whose lookup is a matrix product, so that training is faster.

    The gradient of the product is a sum over rows, which GPUs compute in parallel. The gradient of an indexed lookup is
    a scatter, in which the updates of the many padding tokens are serialised.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.embedding[...]
        return jax.nn.one_hot(ids, len(table), dtype=table.dtype) @ table
