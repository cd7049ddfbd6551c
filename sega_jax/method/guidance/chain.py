"""What the links of a guidance chain share: the predictions that they read, and their precision."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.numerics import at_least_float32


class Predictions(NamedTuple):
    """What the network says of one noisy state x_t; every branch saw the same x_t."""

    uncond: jax.Array  # [batch, *space, channels], for the empty or negative prompt
    cond: jax.Array  # [batch, *space, channels], for the prompt
    edits: jax.Array  # [batch, n, *space, channels], for each concept
    aux: Any = None  # what the solver needs besides and guidance never touches


def wide(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))


def lift(values: Any, like: jax.Array) -> jax.Array:
    """Values that have the leading axes of `like`, in its rank; numbers also in its dtype."""
    values = jnp.asarray(values)
    values = values if values.dtype == bool else values.astype(like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values
