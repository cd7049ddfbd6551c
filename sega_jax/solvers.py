"""Solvers of the reverse process as `init`/`update` pairs of pure functions.

    init(x) -> state
    update(x, state, estimate, aux, row, draw) -> (x, state)

`estimate` is the guided network output, `aux` what a prediction carries besides, `row` a row of the table
of `sega_jax.schedules`, and `draw(shape)` the standard normal noise of this call. States and
coefficients are in the dtype of x, float32 or wider.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Draw = Callable[[tuple[int, ...]], jax.Array]


class Solver(NamedTuple):
    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any, jax.Array, Any, Any, Draw], tuple[jax.Array, Any]]


class MultistepState(NamedTuple):
    start: jax.Array  # [batch, *space, channels], where the last call's step started
    memory: jax.Array  # [remembered, batch, *space, channels], newest first


def _like(x: jax.Array, coefficients: Any) -> Any:
    """Numbers in the dtype of x, flags as they are."""
    return jax.tree.map(lambda c: c if jnp.asarray(c).dtype == bool else jnp.asarray(c).astype(x.dtype), coefficients)


def ddim(eta: Any = 0.0) -> Solver:
    """DDIM (Song et al. 2021, eq. 12); eta, a number or [batch] in [0, 1], is the share of fresh noise.

    x0 is clipped or thresholded where the table says so; eps is the network's own, not the clipped one's,
    as in diffusers' default. DeepFloyd-IF's own DDIM derives it anew from the thresholded x0.
    """

    def init(x):
        del x
        return ()

    def update(x, state, estimate, aux, row, draw):
        del aux
        c = _like(x, row.solver)
        estimate = estimate.astype(x.dtype)
        x0 = _bounded(c.x0_from_x * x + c.x0_from_output * estimate, c)
        eps = c.eps_from_x * x + c.eps_from_output * estimate
        sigma = jnp.asarray(eta).astype(x.dtype) * c.sigma
        sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)) if sigma.ndim else sigma
        towards_x = jnp.sqrt(jnp.maximum(c.variance - sigma**2, 0))
        return c.x0_scale * x0 + towards_x * eps + sigma * draw(x.shape).astype(x.dtype), state

    return Solver(init, update)


def multistep(eta: Any = 0.0, *, memory: int = 3) -> Solver:
    """Linear multi-step methods, all by the formula of `sega_jax.schedules.MultistepRow`; they have no eta.

    `aux`, where the network predicts it, is the variance [batch, *space, channels] in [-1, 1], from the least
    to the greatest (Nichol & Dhariwal 2021, eq. 15).
    """
    del eta

    def init(x):
        return MultistepState(jnp.zeros_like(x), jnp.zeros((memory, *x.shape), x.dtype))

    def update(x, state, estimate, aux, row, draw):
        c = _like(x, row.solver)
        m = _bounded(c.m_from_x * x + c.m_from_output * estimate.astype(x.dtype), c)
        outputs = jnp.concatenate([m[None], state.memory])
        start = c.start_from_x * x + c.start_from_start * state.start + _sum(c.start_from_memory, outputs)
        new = c.x_from_start * start + _sum(c.x_from_memory, outputs)
        noise = c.noise * draw(x.shape).astype(x.dtype)
        if aux is not None:
            share = (aux.astype(x.dtype) + 1) / 2
            noise *= jnp.exp((share * c.log_variance[1] + (1 - share) * c.log_variance[0]) / 2)
        kept = jnp.where(c.remember, outputs[:-1], state.memory)
        return new + noise, MultistepState(start, kept)

    return Solver(init, update)


def _bounded(x: jax.Array, coefficients: Any) -> jax.Array:
    """x [batch, *space, channels] as a row's coefficients bound it: to `clip`, or by its own quantile.

    A table without thresholds is of another structure, so that programs without them sort nothing.
    """
    c = coefficients
    if c.threshold is None:
        return jnp.clip(x, -c.clip, c.clip)
    s = jnp.quantile(jnp.abs(x), c.threshold.ratio, axis=tuple(range(1, x.ndim)), keepdims=True)
    s = jnp.clip(s, 1, c.threshold.most)
    return jnp.clip(x, -s, s) / s


def _sum(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Of the outputs, in full precision on every device, unlike a product of matrices."""
    return sum(weight * output for weight, output in zip(weights, outputs, strict=True))


SOLVERS = {"ddim": ddim, "multistep": multistep, "runge_kutta": partial(multistep, memory=12)}
