"""What a row of a table is: one model call, as numbers."""

from typing import Any, NamedTuple

import numpy as np


class Threshold(NamedTuple):
    """Dynamic thresholding of x0 (Saharia et al. 2022, section 2.3), which lies in [-1, 1] where data do.

    With s the quantile of |x0| over all positions and channels of a picture, at least 1, x0 is clipped to
    [-s, s] and divided by s. The bound `most` is diffusers'; the paper has none.
    """

    ratio: Any  # in [0, 1], of which s is the quantile
    most: Any  # s at most


class DDIMRow(NamedTuple):
    """Coefficients of one DDIM update (Song et al. 2021, eq. 12), abar the product of 1 - beta.

    The network's output becomes x0 and eps by two linear forms, which hold for every prediction type.
    """

    x0_from_x: Any
    x0_from_output: Any
    eps_from_x: Any
    eps_from_output: Any
    clip: Any  # bound of |x0|; infinite for none
    threshold: Threshold | None  # in place of the bound
    x0_scale: Any  # sqrt(abar_prev)
    variance: Any  # 1 - abar_prev, shared by eps and the fresh noise
    sigma: Any  # the fresh noise's standard deviation at eta = 1 (eq. 16)


class TCDRow(NamedTuple):
    """Coefficients of one update of trajectory consistency sampling (Zheng et al. 2024, algorithm 4), as of `DDIMRow`.

    The network takes x to timestep s = floor((1 - eta) following), and fresh noise takes it back up to `following`.
    Both together are DDIM's update with a share of fresh noise that depends on s.
    """

    x0_from_x: Any
    x0_from_output: Any
    eps_from_x: Any
    eps_from_output: Any
    x0_scale: Any  # sqrt(abar_following)
    variance: Any  # 1 - abar_following, shared by eps and the fresh noise
    following: Any  # the timestep of the next call; 0 after the last
    sigma: Any  # [timesteps], the fresh noise's standard deviation by s: sqrt(1 - abar_following / abar_s)


class MultistepRow(NamedTuple):
    """Coefficients of one update of a linear multi-step method, as every solver but DDIM and TCD is.

    With x the state, o the guided output, s the state that the step starts from, z standard normal, and
    m_0 what the solver remembers of this call's output (x0, eps, a derivative, or the output itself), m_1,
    m_2, ... of those before:

        m_0 = bounded(m_from_x x + m_from_output o)
        s  <- start_from_x x + start_from_start s + sum_j start_from_memory[j] m_j
        x  <- x_from_start s + sum_j x_from_memory[j] m_j + noise z

    Where the network predicts the variance, too, `noise` is a share of its square root, which is
    interpolated in its logarithm between the two of `log_variance` (Nichol & Dhariwal 2021, eq. 15); both are
    0 where what it predicts should not count.
    """

    m_from_x: Any
    m_from_output: Any
    clip: Any  # bound of |m_0|; infinite for none
    threshold: Threshold | None  # in place of the bound, where m_0 is x0
    start_from_x: Any
    start_from_start: Any
    start_from_memory: Any  # [1 + remembered]
    x_from_start: Any
    x_from_memory: Any  # [1 + remembered]
    noise: Any
    log_variance: Any  # [2], the least and the greatest
    remember: Any  # bool: whether m_0 joins the memory


class TokenRow(NamedTuple):
    """Numbers of one update of tokens (Rampas et al. 2022)."""

    temperature: Any  # that the guided logits are divided by
    noise: Any  # in [0, 1], the share of positions that take the token that they started from
    renoises: Any  # bool: whether any does


class Row(NamedTuple):
    """One model call; in a table every field has a leading axis [calls]."""

    call: Any  # int32, 0-based; the noise of a call is drawn from it
    live: Any  # bool; rows that are not live fill a chunk up and are skipped
    timestep: Any  # float, in the units of the training's timesteps
    input_scale: Any  # float, what x is multiplied by for the network
    initial_scale: Any  # float, the standard deviation of the noise that sampling starts from; one for all
    signal: Any  # float, of which x is made before the call: x = signal x0 + noise eps
    noise: Any  # float
    solver: Any  # DDIMRow, TCDRow, MultistepRow or TokenRow


def table(
    timesteps: np.ndarray,
    solver: DDIMRow | TCDRow | MultistepRow | TokenRow,
    *,
    input_scale: Any = 1.0,
    initial_scale: float = 1.0,
    shares: tuple[Any, Any] = (0.0, 1.0),
) -> Row:
    """The rows of these calls; `shares` are those of signal and of noise."""
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
    """`count` rows from coefficients that are a number, [count], or for the memory [count, up to 1 + memory].

    Args:
        m: from x and from the output.
        start: from x, from where the last call's step started, and from the memory.
        x: from where the step starts, and from the memory.
        memory: outputs remembered; with one width for all, other coefficients are only other numbers.
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
