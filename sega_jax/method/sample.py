"""The sampling loop: one scan over the model calls of a schedule, each of which denoises, guides and steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sega_jax.method.guidance import Predictions
from sega_jax.method.schedules import Row
from sega_jax.method.solvers import Solver


class Carry(NamedTuple):
    """The state of the loop between model calls."""

    x: jax.Array  # [batch, *space, channels], the noisy state, float32 or wider
    guidance: Any  # the guidance's state; for SEGA, the count of calls and a momentum for each concept
    solver: Any  # the solver's state


def nothing(x: jax.Array, preds: Predictions, guided: jax.Array, state: Any) -> None:
    """Records nothing."""


def sample(
    denoise: Callable[[jax.Array, Row], Predictions],
    guidance: optax.GradientTransformation,
    solver: Solver,
    carry: Carry,
    table: Row,
    draw: Callable[[Row, tuple[int, ...]], jax.Array],
    keep: Callable[[jax.Array, Predictions, jax.Array, Any], Any] = nothing,
) -> tuple[Carry, Any]:
    """Runs the model calls of a schedule's table.

    Calls that are not live are skipped: they cost nothing and change nothing.

    Args:
        denoise: (x, row) -> the predictions of all branches at this x.
        guidance: Turns the unconditional prediction into the guided estimate.
        solver: Turns x and the guided estimate into the next x.
        carry: The state to start from, such as the state that an earlier call of this function returned.
        table: Rows of the schedule, stacked on a leading axis [calls].
        draw: (row, shape) -> standard normal noise for this call.
        keep: (x, predictions, guided estimate, guidance state) -> a pytree of arrays to record. The x and the state
            are those before the call.

    Returns:
        The state after the last call, and the recorded pytree with a leading axis [calls], zero for calls that are not
        live.
    """

    def live(carry, row):
        preds = denoise(carry.x, row)
        guided, g = guidance.update(preds.uncond, carry.guidance, preds)
        x, s = solver.update(carry.x, carry.solver, guided, preds.aux, row, partial(draw, row))
        return Carry(x, g, s), keep(carry.x, preds, guided, carry.guidance)

    def skip(carry, row):
        kept = jax.eval_shape(live, carry, row)[1]
        return carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)

    # The backward pass recomputes a call instead of storing the activations of the network; without gradients this
    # changes nothing.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(carry, row):
        # This must stay outside any vmap, which would turn it into a select that computes both sides.
        return jax.lax.cond(row.live, live, skip, carry, row)

    return jax.lax.scan(step, carry, table)
