"""The rows of a schedule's table. A row holds the numbers for one model call."""

from typing import Any, NamedTuple

import numpy as np


class Threshold(NamedTuple):
    """Dynamic thresholding of x0 (Saharia et al. 2022, section 2.3), for data in [-1, 1].

    Let s be the quantile of |x0| over all positions and channels of a picture, or 1 if the quantile is smaller. Then x0
    is clipped to [-s, s] and divided by s. The upper bound on s comes from diffusers; the paper has none.
    """

    ratio: Any  # the quantile, in [0, 1]
    most: Any  # the upper bound on s


class DDIMRow(NamedTuple):
    """The coefficients of a DDIM update (Song et al. 2021, eq. 12), where abar is the cumulative product of 1 - beta.

    For every prediction type, x0 and eps are linear in x and the network's output.
    """

    x0_from_x: Any
    x0_from_output: Any
    eps_from_x: Any
    eps_from_output: Any
    clip: Any  # the bound on |x0|; infinity means no bound
    threshold: Threshold | None  # replaces the bound
    x0_scale: Any  # sqrt(abar_prev)
    variance: Any  # 1 - abar_prev, split between eps and the fresh noise
    sigma: Any  # the standard deviation of the fresh noise at eta = 1 (eq. 16)


class TCDRow(NamedTuple):
    """The coefficients of an update in trajectory consistency sampling (Zheng et al. 2024, algorithm 4).

    The network's step takes x to timestep s = floor((1 - eta) following), and fresh noise takes it back up to
    `following`. Together, these moves are equivalent to a DDIM update whose share of fresh noise depends on s. Fields
    that also exist in `DDIMRow` have the same meaning.
    """

    x0_from_x: Any
    x0_from_output: Any
    eps_from_x: Any
    eps_from_output: Any
    x0_scale: Any  # sqrt(abar_following)
    variance: Any  # 1 - abar_following, split between eps and the fresh noise
    following: Any  # the timestep of the next call; 0 for the last call
    sigma: Any  # [timesteps], the standard deviation of the fresh noise for each s: sqrt(1 - abar_following / abar_s)


class MultistepRow(NamedTuple):
    """The coefficients of one update by a linear multi-step method. Every solver except DDIM, TCD and `renoise` is such
    a method.

    x is the state, o the guided output, s the state from which the step starts, and z standard normal noise. m_0 is the
    quantity that the solver remembers from this call (x0, eps, a derivative, or the output itself); m_1, m_2, ... are
    the remembered quantities of earlier calls, newest first:

        m_0 = bounded(m_from_x x + m_from_output o)
        s  <- start_from_x x + start_from_start s + sum_j start_from_memory[j] m_j
        x  <- x_from_start s + sum_j x_from_memory[j] m_j + noise z

    If the network also predicts the variance, `noise` is multiplied by the square root of the variance. The logarithm
    of the variance is interpolated between the two entries of `log_variance` (Nichol & Dhariwal 2021, eq. 15). If both
    entries are 0, the predicted variance has no effect.
    """

    m_from_x: Any
    m_from_output: Any
    clip: Any  # the bound on |m_0|; infinity means no bound
    threshold: Threshold | None  # replaces the bound if m_0 is x0
    start_from_x: Any
    start_from_start: Any
    start_from_memory: Any  # [1 + remembered]
    x_from_start: Any
    x_from_memory: Any  # [1 + remembered]
    noise: Any
    log_variance: Any  # [2], for the smallest and the largest variance
    remember: Any  # bool, whether m_0 joins the memory


class TokenRow(NamedTuple):
    """The parameters of one token update (Rampas et al. 2022)."""

    temperature: Any  # the divisor of the guided logits
    noise: Any  # in [0, 1], the share of positions that are reset to their initial tokens
    renoises: Any  # bool, whether any position is reset


class Row(NamedTuple):
    """A model call. In a table, every field has a leading axis [calls]."""

    call: Any  # int32, the call's number, counted from 0; it seeds the call's noise
    live: Any  # bool; False for rows that only pad a chunk and are skipped
    timestep: Any  # float, in units of training timesteps
    input_scale: Any  # float, the factor that scales x for the network
    initial_scale: Any  # float, the standard deviation of the initial noise; the same for all calls
    signal: Any  # float, the share of x0 in x before the call: x = signal x0 + noise eps
    noise: Any  # float, the share of eps in x before the call
    solver: Any  # DDIMRow, TCDRow, MultistepRow or TokenRow


def table(
    timesteps: np.ndarray,
    solver: DDIMRow | TCDRow | MultistepRow | TokenRow,
    *,
    input_scale: Any = 1.0,
    initial_scale: float = 1.0,
    shares: tuple[Any, Any] = (0.0, 1.0),
) -> Row:
    """Returns the table for model calls at `timesteps` [calls].

    Args:
        solver: The coefficients of the solver's updates, with a leading axis [calls].
        input_scale, initial_scale: Numbers or arrays [calls]; see `Row`.
        shares: (signal, noise), each a number or an array [calls]; see `Row`.
    """
    count = len(timesteps)

    def column(value):
        return np.array(np.broadcast_to(np.asarray(value, np.float64), count))

    return Row(
        call=np.arange(count, dtype=np.int32),
        live=np.ones(count, bool),
        timestep=column(timesteps),
        input_scale=column(input_scale),
        initial_scale=column(initial_scale),
        signal=column(shares[0]),
        noise=column(shares[1]),
        solver=solver,
    )


def multistep(
    count: int,
    *,
    m: tuple[Any, Any] = (0.0, 1.0),
    clip: Any = np.inf,
    threshold: Threshold | None = None,
    start: tuple[Any, Any, Any] = (1.0, 0.0, 0.0),
    x: tuple[Any, Any],
    noise: Any = 0.0,
    log_variance: Any = 0.0,
    remember: Any = True,
    memory: int = 3,
) -> MultistepRow:
    """Returns the coefficients for `count` calls.

    Each coefficient is a number or an array [count]; coefficients of the memory may also be arrays [count, n] with n up
    to 1 + memory.

    Args:
        m: The coefficients of x and of the output in the formula for m_0.
        start: The coefficients of x, of the previous start and of the memory in the formula for the start of the step.
        x: The coefficients of the start and of the memory in the formula for the next x.
        memory: The number of remembered outputs. Tables with the same number share a compiled program.
    """

    def column(value, dtype=np.float64):
        return np.array(np.broadcast_to(np.asarray(value, dtype), count))

    def columns(value, width):
        value = np.asarray(value, np.float64)
        value = value if value.ndim == 2 else column(value)[:, None]
        return np.pad(value, ((0, 0), (0, width - value.shape[1])))

    return MultistepRow(
        m_from_x=column(m[0]),
        m_from_output=column(m[1]),
        clip=column(clip),
        threshold=threshold,
        start_from_x=column(start[0]),
        start_from_start=column(start[1]),
        start_from_memory=columns(start[2], 1 + memory),
        x_from_start=column(x[0]),
        x_from_memory=columns(x[1], 1 + memory),
        noise=column(noise),
        log_variance=columns(log_variance, 2),
        remember=column(remember, bool),
    )
