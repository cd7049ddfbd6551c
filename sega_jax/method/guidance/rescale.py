"""Rescaled guidance, which reduces excessive contrast."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sega_jax.method.guidance.chain import Predictions, checked, lift, wide


def rescale(share: Any) -> optax.GradientTransformation:
    """Returns a rule that rescales guidance (Lin et al. 2024, eqs. 15 and 16).

    Each row's estimate is scaled so that its standard deviation over positions and channels equals the conditional
    prediction's. The rescaled and original estimates are then blended with weights `share` and 1 - `share`.

    In a chain, put this rule after `cfg` and before `sega`. One factor scales the entire row. If the estimate already
    contained edits, they would change this factor and therefore every position, even positions that the thresholds
    exclude. In contrast, diffusers' LEDITS++ rescales after adding the edits.

    Args:
        share: The share phi of the rescaled estimate, either a number in [0, 1] or an array [batch].

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from sega_jax import Edit, Edits, Predictions, cfg, rescale, sega
        >>> guidance = optax.chain(cfg(7.5), rescale(0.7), sega(Edits.stack([[Edit("glasses")]])))
        >>> x = jnp.zeros((1, 8, 8, 4))
        >>> predictions = Predictions(x, x, edits=jnp.zeros((1, 1, 8, 8, 4)))
        >>> estimate, state = guidance.update(x, guidance.init(predictions), predictions)
        >>> estimate.shape
        (1, 8, 8, 4)
    """

    def init(params: Predictions) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates, state, params=None):
        preds = checked(params)
        estimate, cond = wide(updates), wide(preds.cond)
        axes = tuple(range(1, cond.ndim))
        target, current = (_std(x, axes) for x in (cond, estimate))
        ratio = jnp.where(current > 0, target / jnp.where(current > 0, current, 1), 1)
        phi = lift(share, estimate)
        return estimate * (phi * ratio + (1 - phi)), state

    return optax.GradientTransformation(init, update)


def _std(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the standard deviation, with a gradient of 0 instead of NaN where the deviation is 0."""
    variance = jnp.var(x, axes, keepdims=True)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
