"""Solvers for the reverse process, as `init`/`update` pairs of pure functions.

    init(x) -> state
    update(x, state, estimate, aux, row, draw) -> (x, state)

`estimate` is the guided network output, `aux` holds the network's other outputs, `row` is one row of a table from
`sega_jax.method.schedules`, and `draw(shape)` returns standard normal noise for this call. For `renoise`, whose x is a
grid of tokens, `draw` returns `Chances`. States and coefficients have the dtype of x, which is float32 or wider.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.naming import assignment

CHOICES = ("sample", "argmax", "nearest")

Draw = Callable[[tuple[int, ...]], jax.Array]


class Solver(NamedTuple):
    """A solver. Its two functions are described in the module's docstring."""

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any, jax.Array, Any, Any, Draw], tuple[jax.Array, Any]]


class MultistepState(NamedTuple):
    """The state of `multistep`."""

    start: jax.Array  # [batch, *space, channels], the state from which the last call's step started
    memory: jax.Array  # [remembered, batch, *space, channels], remembered outputs, newest first


def _like(x: jax.Array, coefficients: Any) -> Any:
    """Converts numbers to the dtype of x; booleans keep their dtype."""
    return jax.tree.map(lambda c: c if jnp.asarray(c).dtype == bool else jnp.asarray(c).astype(x.dtype), coefficients)


def ddim(eta: Any = 0.0) -> Solver:
    """Returns the DDIM solver (Song et al. 2021, eq. 12).

    x0 is clipped or thresholded if the table requires it. As in diffusers by default, eps comes directly from the
    network's output and not from the clipped x0. DeepFloyd-IF's original DDIM derives eps from the thresholded x0.

    Args:
        eta: The share of fresh noise, either a number in [0, 1] or an array [batch].
    """

    def init(x):
        del x
        return ()

    def update(x, state, estimate, aux, row, draw):
        del aux
        c = _like(x, row.solver)
        estimate = estimate.astype(x.dtype)
        x0 = _bounded(c.x0_from_x * x + c.x0_from_output * estimate, c)
        sigma = jnp.asarray(eta).astype(x.dtype) * c.sigma
        return _towards(x, estimate, x0, sigma, c, draw), state

    return Solver(init, update)


def tcd(eta: Any = 0.3) -> Solver:
    """Returns the solver for trajectory consistency sampling (Zheng et al. 2024, algorithm 4).

    As in diffusers, x0 is neither clipped nor thresholded, and the last call ends at timestep 0, so the noise at
    timestep 0 remains.

    Args:
        eta: The paper's gamma, either a number in [0, 1] or an array [batch]. With 0, no noise is added; with 1, every
            call goes down to timestep 0 and back up.
    """

    def init(x):
        del x
        return ()

    def update(x, state, estimate, aux, row, draw):
        del aux
        c = _like(x, row.solver)
        estimate = estimate.astype(x.dtype)
        x0 = c.x0_from_x * x + c.x0_from_output * estimate
        s = jnp.floor((1 - jnp.asarray(eta).astype(x.dtype)) * c.following).astype(jnp.int32)
        return _towards(x, estimate, x0, c.sigma[s], c, draw), state

    return Solver(init, update)


def _towards(x: jax.Array, estimate: jax.Array, x0: jax.Array, sigma: jax.Array, coefficients: Any, draw: Draw) -> Any:
    """Returns the next x, in which fresh noise replaces part of eps. `sigma` is the standard deviation of the fresh
    noise, either a number or an array [batch]."""
    c = coefficients
    eps = c.eps_from_x * x + c.eps_from_output * estimate
    sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)) if sigma.ndim else sigma
    towards_x = jnp.sqrt(jnp.maximum(c.variance - sigma**2, 0))
    return c.x0_scale * x0 + towards_x * eps + sigma * draw(x.shape).astype(x.dtype)


def multistep(eta: Any = 0.0, *, memory: int = 3) -> Solver:
    """Returns the solver for all linear multi-step methods, based on the formula in
    `sega_jax.method.schedules.MultistepRow`.

    If the network predicts the variance, `aux` holds it as [batch, *space, channels] in [-1, 1], where -1 means the
    smallest and 1 the largest variance (Nichol & Dhariwal 2021, eq. 15).

    Args:
        eta: Has no effect. It exists because all solvers have this argument.
        memory: The number of remembered outputs.
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
        memory = jnp.where(c.remember, outputs[:-1], state.memory)
        return new + noise, MultistepState(start, memory)

    return Solver(init, update)


class Chances(NamedTuple):
    """The random numbers for one call of `renoise`."""

    gumbel: jax.Array  # [batch, *space, labels], standard Gumbel
    uniform: jax.Array  # [batch, *space], in [0, 1)


def renoise(eta: Any = 0.0, *, choice: str = "sample", codebook: jax.Array | None = None) -> Solver:
    """Returns Paella's sampler (Rampas et al. 2022), which starts from a random grid of tokens.

    Each call chooses a token for every position, with probabilities softmax(logits / temperature), and then resets a
    random share of the positions to their tokens in the initial grid. As in the published code, the initial grid serves
    as the noise in every call, and no new noise is drawn. x is int32 [batch, *space], and the estimate holds logits
    [batch, *space, labels], float32 or wider.

    Args:
        eta: Has no effect. It exists because all solvers have this argument.
        choice: "sample" draws a token; "argmax" takes the most likely one; "nearest" takes the token whose codebook
            entry is nearest to the expected entry.
        codebook: [labels, channels], for "nearest".

    Raises:
        ValueError: `choice` is unknown, or "nearest" is used without a codebook.
    """
    del eta
    if choice not in CHOICES:
        raise ValueError(f"{assignment('choice', choice)} should be one of {', '.join(CHOICES)}")
    if choice == "nearest" and codebook is None:
        raise ValueError("choice='nearest' needs the codebook [labels, channels] of the tokens")

    def init(x):
        return x

    def update(x, start, estimate, aux, row, draw):
        del aux
        chances = draw(estimate.shape)
        logits = estimate / jnp.asarray(row.solver.temperature).astype(estimate.dtype)
        if choice == "sample":
            drawn = jnp.argmax(logits + chances.gumbel.astype(logits.dtype), -1)
        elif choice == "argmax":
            drawn = jnp.argmax(logits, -1)
        else:
            codes = codebook.astype(logits.dtype)
            expected = jnp.tensordot(jax.nn.softmax(logits, -1), codes, 1, precision="highest")
            drawn = jnp.argmin(_distances(expected, codes), -1)
        noise = jnp.asarray(row.solver.noise).astype(chances.uniform.dtype)
        back = row.solver.renoises & (chances.uniform <= noise)
        return jnp.where(back, start, drawn.astype(x.dtype)), start

    return Solver(init, update)


def _distances(points: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the squared distances [..., labels] between points [..., channels] and codes [labels, channels]. The
    squared norm of each point is left out, because it is the same for all codes."""
    lengths = (codes**2).sum(-1).reshape((1,) * (points.ndim - 1) + (-1,))
    return lengths - 2 * jnp.tensordot(points, codes.T, 1, precision="highest")


def _bounded(x: jax.Array, coefficients: Any) -> jax.Array:
    """Clips x [batch, *space, channels] to `clip`, or applies the dynamic threshold that `Threshold` describes.

    A table without thresholds has a different tree structure, so its compiled program does not sort anything.
    """
    c = coefficients
    if c.threshold is None:
        return jnp.clip(x, -c.clip, c.clip)
    s = jnp.quantile(jnp.abs(x), c.threshold.ratio, axis=tuple(range(1, x.ndim)), keepdims=True)
    s = jnp.clip(s, 1, c.threshold.most)
    return jnp.clip(x, -s, s) / s


def _sum(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Returns the weighted sum of the outputs, in full precision on every device, unlike a matrix product."""
    return sum(weight * output for weight, output in zip(weights, outputs, strict=True))


SOLVERS: dict[str, Callable[[Any], Solver]] = {
    "ddim": ddim,
    "tcd": tcd,
    "multistep": multistep,
    "runge_kutta": partial(multistep, memory=12),
}
