"""Replay of recorded guidance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sega_jax.method.guidance.chain import Predictions, wide


class ReplayState(NamedTuple):
    """The state of `replay`."""

    step: jax.Array  # int32 [batch], the number of model calls so far


def replay(recorded: jax.Array) -> optax.GradientTransformation:
    """Returns a rule that adds recorded guidance to the estimate, one recorded entry for each model call.

    After the last recorded entry, the rule adds nothing.

    Args:
        recorded: [batch, calls, *space, channels].

    Example:
        >>> import jax.numpy as jnp
        >>> from sega_jax import Predictions, replay
        >>> x = jnp.zeros((1, 2, 2, 3))
        >>> predictions = Predictions(x, x)
        >>> guidance = replay(jnp.ones((1, 5, 2, 2, 3)))
        >>> state = guidance.init(predictions)
        >>> estimate, state = guidance.update(x, state, predictions)
        >>> estimate.shape, state.step.tolist()
        ((1, 2, 2, 3), [1])
    """

    def init(params: Predictions) -> ReplayState:
        return ReplayState(jnp.zeros(params.uncond.shape[:1], jnp.int32))

    def update(updates, state, params=None):
        del params
        estimate = wide(updates)

        def entry(rows, i):
            return jnp.where(i < rows.shape[0], rows[jnp.minimum(i, rows.shape[0] - 1)], 0)

        return estimate + jax.vmap(entry)(jnp.asarray(recorded, estimate.dtype), state.step), ReplayState(
            state.step + 1
        )

    return optax.GradientTransformation(init, update)
