"""The predictions that all links in a guidance chain read, and functions that adjust the precision and axes of
arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.numerics import at_least_float32


class Predictions(NamedTuple):
    """A network's predictions for one noisy state x_t. All branches see the same x_t.

    Only `sega` reads `edits`; in a chain without `sega`, `edits` may be None.

    Example:
        >>> import jax.numpy as jnp
        >>> from sega_jax import Predictions
        >>> latents, concepts = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 2, 8, 8, 4))
        >>> Predictions(uncond=latents, cond=latents, edits=concepts).edits.shape
        (1, 2, 8, 8, 4)
    """

    uncond: jax.Array  # [batch, *space, channels], for the empty or negative prompt
    cond: jax.Array  # [batch, *space, channels], for the prompt
    edits: jax.Array | None = None  # [batch, n, *space, channels], for each concept; None if there are no concepts
    aux: Any = None  # extra data for the solver, such as a predicted variance; guidance ignores it


def checked(params: Predictions | None) -> Predictions:
    """Returns the predictions that were passed to a rule's `update` as `params`.

    Raises:
        ValueError: `params` is None. optax allows this, but guidance rules need the predictions.
    """
    if params is None:
        raise ValueError(
            "guidance rules need the predictions as params; call update(estimate, state, predictions) with the"
            " Predictions of this model call"
        )
    return params


def wide(x: jax.Array) -> jax.Array:
    """Converts an array to at least float32."""
    return x.astype(at_least_float32(x.dtype))


def lift(values: Any, like: jax.Array) -> jax.Array:
    """Appends axes to values so that they broadcast against `like`. All values except booleans are cast to the dtype of
    `like`.

    Args:
        values: One value, or an array [batch] or [batch, n].
        like: An array [batch, (n,) *space, channels].
    """
    values = jnp.asarray(values)
    values = values if values.dtype == bool else values.astype(like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values
