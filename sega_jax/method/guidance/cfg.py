"""Classifier-free guidance."""

from typing import Any

import optax

from sega_jax.method.guidance.chain import Predictions, checked, lift, wide


def cfg(scale: Any) -> optax.GradientTransformation:
    """Returns a classifier-free guidance rule (Ho & Salimans 2021), which adds s (p - u) to the estimate.

    Here u and p are the predictions `uncond` and `cond`. Starting from u, the result is u + s (p - u): s = 0 gives the
    unconditional prediction and s = 1 the conditional one.

    Args:
        scale: The guidance scale s: any number, or an array [batch].

    Example:
        >>> import jax.numpy as jnp
        >>> from sega_jax import Predictions, cfg
        >>> uncond, cond = jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3))
        >>> predictions = Predictions(uncond, cond)
        >>> guidance = cfg(7.5)
        >>> state = guidance.init(predictions)
        >>> estimate, state = guidance.update(uncond, state, predictions)
        >>> estimate.shape, bool((estimate == 7.5).all())
        ((1, 2, 2, 3), True)
    """

    def init(params: Predictions) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates, state, params=None):
        preds = checked(params)
        uncond = wide(preds.uncond)
        return wide(updates) + lift(scale, uncond) * (wide(preds.cond) - uncond), state

    return optax.GradientTransformation(init, update)
