"""The threshold mask of semantic guidance, computed from quantiles of magnitudes."""

import math

import jax
import jax.numpy as jnp

SUPPORTS = ("channel", "latent", "pixel", "position")
# Quantiles of up to this many values (entries x channels) are found by sorting. For more values, such as the logits of
# a picture, sorting is slower than counting and needs several times the memory of the values. TPUs always use counting,
# because sorting takes a long time to compile there.
_SORTED = 2**20


def threshold_mask(magnitude: jax.Array, threshold: jax.Array, support: str) -> jax.Array:
    """Returns True where a magnitude reaches the quantile of its group.

    NaN passes the mask, so that a broken prediction stays visible.

    Args:
        magnitude: |psi|, [batch, n, *space, channels].
        threshold: The quantile in [0, 1], [batch, n].
        support: Which values share a quantile: one of `SUPPORTS`; see `sega`.

    Returns:
        bool [batch, n, *space, channels]; for "pixel", the last axis has length 1.
    """
    if support == "pixel":
        magnitude = magnitude.sum(-1, keepdims=True)
    batch, n, *space, channels = magnitude.shape
    if support == "latent":
        flat = magnitude.reshape(batch, n, math.prod(space) * channels, 1)
    elif support == "position":
        flat = magnitude.reshape(batch, n * math.prod(space), channels, 1)
        threshold = jnp.repeat(threshold, math.prod(space), 1)
    else:
        flat = magnitude.reshape(batch, n, math.prod(space), channels)
    limit = quantile(flat, threshold)
    return ~(flat < limit[:, :, None]).reshape(magnitude.shape)


def quantile(values: jax.Array, share: jax.Array) -> jax.Array:
    """Returns each channel's quantile over the entries, interpolated linearly and rounded as in torch.

    If the quantile lies between two equal values, the result equals them exactly, whereas the result of `jnp.quantile`
    may differ in the last digit. Equal magnitudes therefore either all reach the quantile or all fall below it.

    Args:
        values: Non-negative numbers [..., entries, channels].
        share: The quantile in [0, 1], [...].

    Returns:
        [..., channels].
    """
    rank = (share * jnp.asarray(values.shape[-2] - 1, values.dtype))[..., None]
    below = jnp.floor(rank)
    neighbours = _by_sorting if math.prod(values.shape[-2:]) <= _SORTED else _by_counting
    low, high = jax.lax.platform_dependent(values, below.astype(jnp.int32), tpu=_by_counting, default=neighbours)
    high, w = jnp.where(rank == below, low, high), rank - below
    return jnp.where(w < 0.5, low + w * (high - low), high - (high - low) * (1 - w))


def _by_sorting(values: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sorts the entries and returns the values [..., channels] at rank `place` [..., 1] and at the next rank."""
    ordered = jnp.sort(values, -2)

    def at(index):
        index = jnp.broadcast_to(jnp.minimum(index, values.shape[-2] - 1), (*values.shape[:-2], values.shape[-1]))
        return jnp.take_along_axis(ordered, index[..., None, :], -2)[..., 0, :]

    return at(place), at(place + 1)


def _by_counting(values: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns bit-for-bit the same values as `_by_sorting`, but without sorting.

    Non-negative floats sort like their bit patterns, so the result is found bit by bit, starting with the highest bit.
    For each bit, one pass over the values counts the entries that are smaller than a candidate. This needs little
    memory.
    """
    bits = 8 * values.dtype.itemsize - 1
    integer = jnp.dtype(f"int{bits + 1}")
    place = place.astype(integer)

    def ordered():
        return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(values), integer)

    def halve(i, prefix):
        candidate = prefix | jnp.left_shift(jnp.ones((), integer), jnp.asarray(bits - 1 - i, integer))
        smaller = (ordered() < candidate[..., None, :]).sum(-2, dtype=integer)
        return jnp.where(smaller <= place, candidate, prefix)

    low = jax.lax.fori_loop(0, bits, halve, jnp.zeros((*values.shape[:-2], values.shape[-1]), integer))
    upto = ordered() <= low[..., None, :]
    high = jnp.where(upto, jnp.iinfo(integer).max, ordered()).min(-2)
    high = jnp.where(upto.sum(-2, dtype=integer) > place + 1, low, high)
    return jax.lax.bitcast_convert_type(low, values.dtype), jax.lax.bitcast_convert_type(high, values.dtype)
