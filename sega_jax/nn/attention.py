"""Scaled dot-product attention, with a choice of implementations."""

import math

import jax
import jax.numpy as jnp

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.flash_attention import flash

# Attention with more logits than this (1 GiB in float32) is computed row by row.
_LOGITS = 2**28
# Attention with fewer logits uses XLA instead of cuDNN, because XLA is then faster: 30 us instead of 48 us for 1.6
# million logits (3 rows, 8 heads, 256 positions of width 160) on an H100, and 44 us instead of 91 us for 3.9 million on
# an H200. For 16 million logits, XLA takes 189 us and cuDNN 89 us.
_CUDNN_LOGITS = 2**22
# Attention to fewer keys uses XLA instead of the TPU kernel, because XLA's program then usually moves fewer bytes.
# The table in tests/benchmarks/README.md shows the exceptions.
_PALLAS_KEYS = 384


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    heads: int,
    causal: bool = False,
    mask: jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Returns scaled dot-product attention [batch, queries, heads x width], with the softmax in at least float32.

    Args:
        query, key, value: [batch, positions, heads x width].
        causal: Whether queries attend only to keys up to their own position.
        mask: bool [batch, keys], True for the keys to attend to (at least one in each row); None means all keys.
        implementation: "xla" runs everywhere. "cudnn" uses cuDNN's kernels on a GPU in half precision, for head widths
            that they support on all GPUs and at least `_CUDNN_LOGITS` logits. "pallas" uses JAX's kernel on a TPU in
            bfloat16 or float32, for at least `_PALLAS_KEYS` keys. In all other cases, "cudnn" and "pallas" use XLA.
    """
    width, logits = query.shape[-1] // heads, len(query) * heads * query.shape[1] * key.shape[1]
    q, k, v = (x.reshape(*x.shape[:2], heads, width) for x in (query, key, value))
    cudnn_fits = width % 8 == 0 and width <= 128 and jnp.finfo(query.dtype).bits == 16
    if implementation == "cudnn" and cudnn_fits and logits >= _CUDNN_LOGITS:
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None, None, :], (len(q), 1, q.shape[1], k.shape[1]))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")
        return out.reshape(query.shape)
    if implementation == "pallas" and query.dtype in (jnp.bfloat16, jnp.float32) and key.shape[1] >= _PALLAS_KEYS:
        return flash(q, k, v, mask, causal).reshape(query.shape)
    if logits <= _LOGITS:
        return _attend(q, k, v, mask, causal).reshape(query.shape)
    return jax.lax.map(lambda row: _attend_one(row, causal), (q, k, v, mask)).reshape(query.shape)


def _attend_one(row: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None], causal: bool) -> jax.Array:
    """Computes one picture's attention [positions, heads, width], in blocks of queries if there are many logits."""
    q, k, v, mask = row
    block = _LOGITS // (q.shape[1] * len(k))
    k, v, mask = jax.tree.map(lambda x: x[None], (k, v, mask))
    if causal or block >= len(q):
        return _attend(q[None], k, v, mask, causal)[0]

    def attend_query(query):
        return _attend(query[None, None], k, v, mask, False)[0, 0]

    return jax.lax.map(attend_query, q, batch_size=max(block, 1))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array:
    """Computes attention over [batch, positions, heads, width] with all logits in memory at once."""
    # JAX's attention function would compute the softmax in float32 even for float64 inputs.
    logits = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=at_least_float32(q.dtype))
    logits = logits / math.sqrt(q.shape[-1])
    if causal:
        past = jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool)[None, None]
        logits = jnp.where(past, logits, -jnp.inf)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bhqk,bkhc->bqhc", weights, v)
