"""Replay of recorded guidance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sega_jax.method.guidance.chain import Predictions, wide


class ReplayState(NamedTuple):
    """The state of `replay`."""

    step: jax.Array  # int32 [batch], model calls so far


def replay(recorded: jax.Array) -> optax.GradientTransformation:
    """Returns guidance that adds recorded guidance to the estimate, one entry for each model call.

    Calls after the end of the record add nothing.

    Args:
        recorded: [batch, calls, *space, channels].

    Example:
        >>> import jax.numpy as jnp
        >>> from sega_jax import Predictions, replay
        >>> x = jnp.zeros((1, 2, 2, 3))
        >>> predictions = Predictions(x, x, edits=jnp.zeros((1, 0, 2, 2, 3)))
        >>> guidance = replay(jnp.ones((1, 5, 2, 2, 3)))
        >>> state = guidance.init(predictions)
        >>> estimate, state = guidance.update(x, state, predictions)
        >>> estimate.shape, state.step.tolist()
        ((1, 2, 2, 3), [1])
    """

    def init(preds: Predictions) -> ReplayState:
        return ReplayState(jnp.zeros(preds.uncond.shape[:1], jnp.int32))

    def update(estimate, state, preds):
        del preds
        estimate = wide(estimate)

        def entry(rows, i):
            return jnp.where(i < rows.shape[0], rows[jnp.minimum(i, rows.shape[0] - 1)], 0)

        return estimate + jax.vmap(entry)(jnp.asarray(recorded, estimate.dtype), state.step), ReplayState(
            state.step + 1
        )

    return optax.GradientTransformation(init, update)
