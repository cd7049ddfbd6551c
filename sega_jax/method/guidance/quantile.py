"""Which entries of a concept's direction reach its threshold, by quantiles of their magnitude."""

import math

import jax
import jax.numpy as jnp

SUPPORTS = ("channel", "latent", "pixel", "position")
# Up to so many values, entries by channels, are sorted for their quantiles, in one pass; more, such as the logits of a
# whole picture, would take longer and several times their memory. TPUs always count, since a sort takes long to compile
# for them.
_SORTED = 2**20


def threshold_mask(magnitude: jax.Array, threshold: jax.Array, support: str) -> jax.Array:
    """Where |psi| [batch, n, *space, channels] reaches its quantile; thresholds are [batch, n].

    What is not a number reaches it, too, lest a broken prediction looks like one without an edit.
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
    """The quantiles [..., channels] of what is not negative, [..., entries, channels], by linear interpolation as
    torch rounds it; shares are [...].

    Between equal values it is that value, which `jnp.quantile` may miss by the last digit: of equal magnitudes all
    reach it, or none.
    """
    rank = (share * jnp.asarray(values.shape[-2] - 1, values.dtype))[..., None]
    below = jnp.floor(rank)
    neighbours = _by_sorting if math.prod(values.shape[-2:]) <= _SORTED else _by_counting
    low, high = jax.lax.platform_dependent(values, below.astype(jnp.int32), tpu=_by_counting, default=neighbours)
    high, w = jnp.where(rank == below, low, high), rank - below
    return jnp.where(w < 0.5, low + w * (high - low), high - (high - low) * (1 - w))


def _by_sorting(values: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The entries [..., channels] at a place [..., 1] of their order, and at the next."""
    ordered = jnp.sort(values, -2)

    def at(index):
        index = jnp.broadcast_to(jnp.minimum(index, values.shape[-2] - 1), (*values.shape[:-2], values.shape[-1]))
        return jnp.take_along_axis(ordered, index[..., None, :], -2)[..., 0, :]

    return at(place), at(place + 1)


def _by_counting(values: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same to the last bit, of entries that are not negative: these are in the order of their bits, which are
    found one by one, from the highest. It takes a pass for each bit, and no memory to speak of."""
    bits = 8 * values.dtype.itemsize - 1
    integer = jnp.dtype(f"int{bits + 1}")
    place = place.astype(integer)

    def ordered():
        return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(values), integer)

    def halve(i, found):
        more = found | jnp.left_shift(jnp.ones((), integer), jnp.asarray(bits - 1 - i, integer))
        fewer = (ordered() < more[..., None, :]).sum(-2, dtype=integer)
        return jnp.where(fewer <= place, more, found)

    low = jax.lax.fori_loop(0, bits, halve, jnp.zeros((*values.shape[:-2], values.shape[-1]), integer))
    upto = ordered() <= low[..., None, :]
    high = jnp.where(upto, jnp.iinfo(integer).max, ordered()).min(-2)
    high = jnp.where(upto.sum(-2, dtype=integer) > place + 1, low, high)
    return jax.lax.bitcast_convert_type(low, values.dtype), jax.lax.bitcast_convert_type(high, values.dtype)
