"""Guidance rescaled against too much contrast."""

from typing import Any

import jax.numpy as jnp
import optax

from sega_jax.method.guidance.chain import Predictions, lift, wide


def rescale(share: Any) -> optax.GradientTransformation:
    """Rescaled guidance (Lin et al. 2024, eqs. 15 and 16): brings the estimate's standard deviation, over a row's
    positions and channels, to that of the prompt's prediction, and takes `share` of that and the rest as it was; a
    number or [batch] in [0, 1].

    It stands after classifier-free guidance and before semantic guidance, which is not rescaled: the factor is one for
    the whole row, and with what edits add inside it, these would change every position, also those below their
    threshold. So an edit leaves the rest of the estimate as it would be without it. (LEDITS++ in diffusers has them
    inside.)
    """

    def init(preds: Predictions) -> optax.EmptyState:
        del preds
        return optax.EmptyState()

    def update(estimate, state, preds):
        estimate, cond = wide(estimate), wide(preds.cond)
        axes = tuple(range(1, cond.ndim))
        target, own = (jnp.std(x, axes, keepdims=True) for x in (cond, estimate))
        ratio = jnp.where(own > 0, target / jnp.where(own > 0, own, 1), 1)
        phi = lift(share, estimate)
        return estimate * (phi * ratio + (1 - phi)), state

    return optax.GradientTransformation(init, update)
