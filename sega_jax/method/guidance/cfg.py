"""Classifier-free guidance."""

from typing import Any

import optax

from sega_jax.method.guidance.chain import Predictions, lift, wide


def cfg(scale: Any) -> optax.GradientTransformation:
    """Classifier-free guidance (Ho & Salimans 2021): adds s (p - u), for any s.

    From u this gives u + s (p - u): s = 0 is the unconditional estimate, 1 the conditional one. `scale`
    is a number or [batch].
    """

    def init(preds: Predictions) -> optax.EmptyState:
        del preds
        return optax.EmptyState()

    def update(estimate, state, preds):
        uncond = wide(preds.uncond)
        return wide(estimate) + lift(scale, uncond) * (wide(preds.cond) - uncond), state

    return optax.GradientTransformation(init, update)
