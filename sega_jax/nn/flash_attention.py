"""Attention with JAX's flash kernel for TPUs, which does not store the logits (Dao et al. 2022, arXiv 2205.14135)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

# The number of positions must be a multiple of this number, and so must the width of a head unless it is smaller.
_LANES = 128
_BLOCKS = (640, 512, 384, 256, 128)


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
    blocks = _blocks(kernel, q.shape[2], k.shape[2])
    out = _kernel(q, k, v, segments, causal=causal, sm_scale=1 / math.sqrt(width), block_sizes=blocks)
    return out[:, :, :queries, :width].swapaxes(1, 2)


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, **options: Any) -> jax.Array:
    """Calls JAX's kernel, whose matrix products have the same precision in the backward pass as in the forward pass.

    By default, JAX takes the precision for the backward pass from the settings that are active when it runs. Mosaic
    rejects products of bfloat16 matrices that have a higher precision.
    """
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    # mypy does not recognise this option, because JAX defines its options at run time.
    current = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    precision = "default" if q.dtype == jnp.bfloat16 else current

    def call(q, k, v, segments):
        return flash_attention(q, k, v, None, segments, **options)

    @jax.custom_vjp
    def precise(q, k, v, segments):
        with jax.default_matmul_precision(precision):
            return call(q, k, v, segments)

    def forward(q, k, v, segments):
        with jax.default_matmul_precision(precision):
            return jax.vjp(lambda *qkv: call(*qkv, segments), q, k, v)

    def backward(vjp, gradient):
        with jax.default_matmul_precision(precision):
            return *vjp(gradient), None

    precise.defvjp(forward, backward)
    return precise(q, k, v, segments)


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
