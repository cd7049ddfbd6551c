"""Attention with JAX's flash kernel for TPUs, which does not store the logits (Dao et al. 2022, arXiv 2205.14135)."""

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp

# The number of positions must be a multiple of this number, and so must the width of a head unless it is smaller.
_LANES = 128
_BLOCKS = (512, 384, 256, 128)


def flash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array:
    """Computes attention on a TPU, or in Pallas' interpret mode.

    It supports reverse-mode gradients, but neither forward-mode gradients nor second derivatives.

    Args:
        q, k, v: [batch, positions, heads, width], in bfloat16 or float32.
        mask: bool [batch, keys], True for the keys to attend to (at least one in each row); None means all keys.
        causal: Whether queries attend only to keys up to their own position.

    Returns:
        [batch, queries, heads, width].
    """
    # Imported here because the import is slow and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    (batch, queries, _, width), keys = q.shape, k.shape[1]
    q, k, v = (_padded(x) for x in (q, k, v))
    segments = None
    if mask is not None or k.shape[2] > keys:
        visible = jnp.ones((batch, keys), bool) if mask is None else mask
        visible = jnp.pad(visible, ((0, 0), (0, k.shape[2] - keys))).astype(jnp.int32)
        segments = kernel.SegmentIds(jnp.ones((batch, q.shape[2]), jnp.int32), visible)
    blocks, scale = _blocks(kernel, q.shape[2], k.shape[2]), 1 / math.sqrt(width)
    # The kernel does not compile if bfloat16 products should have a higher precision.
    precision = "default" if q.dtype == jnp.bfloat16 else None
    with jax.default_matmul_precision(precision) if precision else nullcontext():
        out = kernel.flash_attention(q, k, v, None, segments, causal=causal, sm_scale=scale, block_sizes=blocks)
    return out[:, :, :queries, :width].swapaxes(1, 2)


def _padded(x: jax.Array) -> jax.Array:
    """Transposes [batch, positions, heads, width] to [batch, heads, positions, width], and pads the last two axes with
    zeros."""
    width = -x.shape[3] % _LANES if x.shape[3] > _LANES else 0
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % _LANES), (0, width)))


def _blocks(kernel: Any, queries: int, keys: int) -> Any:
    """Returns the block sizes of the kernel. Blocks are large, because the kernel runs faster with fewer blocks.

    The backward pass uses the kernel's default sizes, because other sizes give wrong gradients.
    """
    of_queries, of_keys = (next(size for size in _BLOCKS if n % size == 0) for n in (queries, keys))
    defaults = kernel.BlockSizes.get_default(1, 1, queries, keys, _LANES)
    return dataclasses.replace(defaults, block_q=of_queries, block_k_major=of_keys, block_k=of_keys)
