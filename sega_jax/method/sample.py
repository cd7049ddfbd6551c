"""The loop: denoise, guide, step, inside one scan over the rows of a schedule's table."""

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
    """What goes from one model call to the next."""

    x: jax.Array  # [batch, *space, channels], the noisy state, float32 or wider
    guidance: Any  # the guidance's state, for SEGA the step count and a momentum per concept
    solver: Any  # the solver's state


def nothing(x: jax.Array, preds: Predictions, guided: jax.Array, state: Any) -> None:
    """Keeps nothing."""


def sample(
    denoise: Callable[[jax.Array, Row], Predictions],
    guidance: optax.GradientTransformation,
    solver: Solver,
    carry: Carry,
    table: Row,
    draw: Callable[[Row, tuple[int, ...]], jax.Array],
    keep: Callable[[jax.Array, Predictions, jax.Array, Any], Any] = nothing,
) -> tuple[Carry, Any]:
    """Runs the model calls of `table`; rows that are not live cost nothing and change nothing.

    Args:
        denoise: (x, row) -> the predictions for every branch at this x.
        guidance: takes the unconditional prediction to the guided estimate.
        solver: takes x and the guided estimate to the next x.
        carry: where to start, or where an earlier call of this function ended.
        table: rows stacked on a leading axis [calls].
        draw: (row, shape) -> the standard normal noise of this row.
        keep: (x, predictions, guided estimate, guidance state), the x and the state being those that the
            predictions were made and guided from -> what to record.

    Returns:
        The carry after the last row, and what was kept, stacked on a leading axis [calls] (zeros for rows
        that are not live).
    """

    def live(carry, row):
        preds = denoise(carry.x, row)
        guided, g = guidance.update(preds.uncond, carry.guidance, preds)
        x, s = solver.update(carry.x, carry.solver, guided, preds.aux, row, partial(draw, row))
        return Carry(x, g, s), keep(carry.x, preds, guided, carry.guidance)

    def skip(carry, row):
        kept = jax.eval_shape(live, carry, row)[1]
        return carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)

    # Gradients compute a call anew instead of keeping what the network went through; without them this is nothing.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(carry, row):
        # The condition stays outside any vmap, where it would turn into computing both sides.
        return jax.lax.cond(row.live, live, skip, carry, row)

    return jax.lax.scan(step, carry, table)
