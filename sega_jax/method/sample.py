"""The sampling loop: a scan over the model calls of a schedule. Each call denoises, applies the guidance and takes a
step."""

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
    guidance: Any  # the guidance state; for SEGA, the number of calls and a momentum for each concept
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

    Calls that are not live are skipped: they take no time and change nothing.

    Args:
        denoise: (x, row) -> the predictions of all branches at this x.
        guidance: Turns the unconditional prediction into the guided estimate.
        solver: Turns x and the guided estimate into the next x.
        carry: The state to start from, for example the state that an earlier call to this function returned.
        table: Rows of the schedule, stacked on a leading axis [calls].
        draw: (row, shape) -> standard normal noise for this call.
        keep: (x, predictions, guided estimate, guidance state) -> a pytree of arrays to record. x and the state are
            passed as they were before the call.

    Returns:
        The state after the last call, and the recorded pytree with a leading axis [calls]. Its entries are zero for
        calls that are not live.
    """

    def live(carry, row):
        preds = denoise(carry.x, row)
        guided, g = guidance.update(preds.uncond, carry.guidance, preds)
        x, s = solver.update(carry.x, carry.solver, guided, preds.aux, row, partial(draw, row))
        return Carry(x, g, s), keep(carry.x, preds, guided, carry.guidance)

    def skip(carry, row):
        kept = jax.eval_shape(live, carry, row)[1]
        return carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)

    # The backward pass recomputes each call instead of storing the network's activations. Without gradients, this has
    # no effect.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(carry, row):
        # Never put this `cond` inside a vmap, which would turn it into a select that computes both branches.
        return jax.lax.cond(row.live, live, skip, carry, row)

    return jax.lax.scan(step, carry, table)
