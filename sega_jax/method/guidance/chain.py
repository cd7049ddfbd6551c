"""The predictions that all links of a guidance chain read, and helpers for their precision and axes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.numerics import at_least_float32


class Predictions(NamedTuple):
    """The predictions of a network for one noisy state x_t. All branches see the same x_t.

    Example:
        >>> import jax.numpy as jnp
        >>> from sega_jax import Predictions
        >>> latents, concepts = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 2, 8, 8, 4))
        >>> Predictions(uncond=latents, cond=latents, edits=concepts).edits.shape
        (1, 2, 8, 8, 4)
    """

    uncond: jax.Array  # [batch, *space, channels], for the empty or negative prompt
    cond: jax.Array  # [batch, *space, channels], for the prompt
    edits: jax.Array  # [batch, n, *space, channels], for each concept
    aux: Any = None  # further outputs for the solver, such as a predicted variance; guidance ignores them


def wide(x: jax.Array) -> jax.Array:
    """Converts an array to at least float32."""
    return x.astype(at_least_float32(x.dtype))


def lift(values: Any, like: jax.Array) -> jax.Array:
    """Appends axes of length 1 to values [batch] or [batch, n], up to the rank of `like`.

    Numbers also take the dtype of `like`; booleans and single numbers keep their shape.
    """
    values = jnp.asarray(values)
    values = values if values.dtype == bool else values.astype(like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values
