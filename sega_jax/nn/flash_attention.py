"""Attention by the flash kernel for TPUs that comes with JAX, which keeps no logits in memory (Dao et al. 2022, arXiv
2205.14135)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

# The kernel takes positions in blocks of whole lanes, and so the width of heads that are wider than one.
_LANES = 128
_BLOCKS = (512, 384, 256, 128)


def flash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array:
    """Attention of [batch, positions, heads, width] in bfloat16 or float32, on a TPU or in Pallas' interpret mode.

    With a `mask`, bool [batch, keys], the other keys are as if they were not there; each row needs one that is. It has
    gradients, but no derivatives in forward mode and none of gradients.
    """
    # It takes long to import, and is of no use without a TPU.
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    (batch, queries, _, width), keys = q.shape, k.shape[1]
    q, k, v = (_padded(x) for x in (q, k, v))
    segments = None
    if mask is not None or k.shape[2] > keys:
        there = jnp.ones((batch, keys), bool) if mask is None else mask
        there = jnp.pad(there, ((0, 0), (0, k.shape[2] - keys))).astype(jnp.int32)
        segments = kernel.SegmentIds(jnp.ones((batch, q.shape[2]), jnp.int32), there)
    blocks, scale = _blocks(kernel, q.shape[2], k.shape[2]), 1 / math.sqrt(width)
    found = kernel.flash_attention(q, k, v, None, segments, causal=causal, sm_scale=scale, block_sizes=blocks)
    return found[:, :, :queries, :width].swapaxes(1, 2)


def _padded(x: jax.Array) -> jax.Array:
    """x [batch, positions, heads, width] as [batch, heads, positions, width], the last two with zeros behind."""
    width = -x.shape[3] % _LANES if x.shape[3] > _LANES else 0
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % _LANES), (0, width)))


def _blocks(kernel: Any, queries: int, keys: int) -> Any:
    """Large blocks, of which there are fewer; of a gradient the kernel's own, as others are not right in it."""
    of_queries, of_keys = (next(size for size in _BLOCKS if n % size == 0) for n in (queries, keys))
    own = kernel.BlockSizes.get_default(1, 1, queries, keys, _LANES)
    return dataclasses.replace(own, block_q=of_queries, block_k_major=of_keys, block_k=of_keys)
