"""Solvers of the reverse process as `init`/`update` pairs of pure functions.

    init(x) -> state
    update(x, state, estimate, aux, row, draw) -> (x, state)

`estimate` is the guided network output, `aux` what a prediction carries besides, `row` a row of the table
of `sega_jax.schedules`, and `draw(shape)` the standard normal noise of this call. States and
coefficients are in the dtype of x, float32 or wider.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Draw = Callable[[tuple[int, ...]], jax.Array]


class Solver(NamedTuple):
    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any, jax.Array, Any, Any, Draw], tuple[jax.Array, Any]]


class PLMSState(NamedTuple):
    x: jax.Array  # [batch, *space, channels], where the last call started
    history: jax.Array  # [3, batch, *space, channels], the last outputs, newest first


def _like(x: jax.Array, coefficients: Any) -> Any:
    """Numbers in the dtype of x, flags as they are."""
    return jax.tree.map(lambda c: c if jnp.asarray(c).dtype == bool else jnp.asarray(c).astype(x.dtype), coefficients)


def ddim(eta: Any = 0.0) -> Solver:
    """DDIM (Song et al. 2021, eq. 12); eta, a number or [batch] in [0, 1], is the share of fresh noise.

    x0 is clipped where the table says so; eps is the network's own, not the clipped one's, as in
    diffusers' default.
    """

    def init(x):
        del x
        return ()

    def update(x, state, estimate, aux, row, draw):
        del aux
        c = _like(x, row.solver)
        estimate = estimate.astype(x.dtype)
        x0 = jnp.clip(c.x0_from_x * x + c.x0_from_output * estimate, -c.clip, c.clip)
        eps = c.eps_from_x * x + c.eps_from_output * estimate
        sigma = jnp.asarray(eta).astype(x.dtype) * c.sigma
        sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)) if sigma.ndim else sigma
        towards_x = jnp.sqrt(jnp.maximum(c.variance - sigma**2, 0))
        return c.x0_scale * x0 + towards_x * eps + sigma * draw(x.shape).astype(x.dtype), state

    return Solver(init, update)


def plms(eta: Any = 0.0) -> Solver:
    """Pseudo linear multi-step (Liu et al. 2022), without the Runge-Kutta start; it has no eta.

    diffusers' `PNDMScheduler` with `skip_prk_steps`, after Katherine Crowson's sampler.
    """
    del eta

    def init(x):
        return PLMSState(jnp.zeros_like(x), jnp.zeros((3, *x.shape), x.dtype))

    def update(x, state, estimate, aux, row, draw):
        del aux, draw
        c = _like(x, row.solver)
        outputs = jnp.concatenate([estimate.astype(x.dtype)[None], state.history])
        mean = jnp.tensordot(c.weights, outputs, 1)
        start = jnp.where(c.again, state.x, x)
        history = jnp.where(c.again, state.history, outputs[:3])
        return c.from_x * start + c.from_estimate * mean, PLMSState(x, history)

    return Solver(init, update)


SOLVERS = {"ddim": ddim, "plms": plms}
