"""Tables for the solvers that step along abar (DDIM, DDPM and PNDM), and for IPNDM, which has no betas.

Their state is x = a x0 + b eps with a = sqrt(abar) and b = sqrt(1 - abar). Where betas are zero, there is no noise
(b = 0) and x is already x0. At such timesteps, a DDIM or DDPM call returns x0, which is x itself unless the network
predicts x0 or x0 is clipped. A PNDM call leaves x unchanged.
"""

import itertools
import math
from typing import Any

import numpy as np

from sega_jax.method.naming import assignment
from sega_jax.method.schedules.calls import DDIMRow, Row, Threshold, multistep, table
from sega_jax.method.schedules.spacing import Options, cumulative, spaced


def x0_form(options: Options, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (p, q) with x0 = p x + q output. With v-prediction, the output is a eps - b x0 (Salimans & Ho 2022)."""
    if options["prediction_type"] == "v_prediction":
        return a, -b
    if options["prediction_type"] == "sample":
        return np.zeros_like(a), np.ones_like(a)
    with np.errstate(divide="ignore"):
        return 1 / a, -b / a


def eps_form(options: Options, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (p, q) with eps = p x + q output. Without noise, eps cannot be computed from x and x0, so it is set to
    0."""
    if options["prediction_type"] == "v_prediction":
        return b, a
    if options["prediction_type"] == "sample":
        return _over(1.0, b), -_over(a, b)
    return np.zeros_like(a), np.ones_like(a)


def _over(numerator: Any, denominator: np.ndarray) -> np.ndarray:
    """Returns the quotient, or 0 where the denominator is 0."""
    numerator = np.broadcast_to(np.asarray(numerator, np.float64), denominator.shape)
    return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator != 0)


def clip_of(options: Options) -> float:
    """Returns the bound on |x0|; infinity means no bound."""
    return options["clip_sample_range"] if options["clip_sample"] else math.inf


def threshold(options: Options, calls: int) -> Threshold | None:
    """Returns the settings for dynamic thresholding as columns [calls], or None if `thresholding` is off.

    With `thresholding`, `clip_sample` has no effect, as in diffusers. If the solver remembers eps, thresholding is
    rejected with an error. In contrast, diffusers derives eps from the thresholded x0 (DPM-Solver) or ignores the
    option (UniPC).
    """
    if not options["thresholding"]:
        return None
    ratio, most = (
        np.full(calls, options[key], np.float64) for key in ("dynamic_thresholding_ratio", "sample_max_value")
    )
    return Threshold(ratio, most)


def _at(options: Options, bars: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Returns abar at timesteps. Below timestep 0, abar is 1, or abar_0 without `set_alpha_to_one`."""
    before = 1.0 if options.get("set_alpha_to_one", True) else bars[0]
    return np.where(t < 0, before, bars[np.clip(t, 0, len(bars) - 1)])


def ddim(options: Options, steps: int) -> Row:
    """Returns the table for DDIM (Song et al. 2021).

    With any spacing, a step goes from t to t - T // steps, as in diffusers; with a list of timesteps, it goes to the
    next entry.
    """
    bars, t = cumulative(options), spaced(options, steps).astype(int)
    following = np.append(t[1:], -1) if "timesteps" in options else t - options["num_train_timesteps"] // steps
    now, after = _at(options, bars, t), _at(options, bars, following)
    a, b = np.sqrt(now), np.sqrt(1 - now)
    return table(
        t,
        DDIMRow(
            *x0_form(options, a, b),
            *eps_form(options, a, b),
            clip=np.full_like(a, clip_of(options)),
            threshold=threshold(options, len(t)),
            x0_scale=np.sqrt(after),
            variance=1 - after,
            sigma=np.sqrt(_over(1 - after, 1 - now) * np.maximum(1 - now / after, 0)),
        ),
        shares=(a, b),
    )


def ddpm(options: Options, steps: int) -> Row:
    """Returns the table for DDPM (Ho et al. 2020, eqs. 6 and 7). No noise is added at timestep 0.

    Betas are computed for the steps between the table's timesteps, as in DeepFloyd-IF's own code. If the last timestep
    is above 0, noise is added after it, as in diffusers; DeepFloyd-IF's code adds none.

    A predicted variance has an effect only with "learned_range".
    """
    bars, t = cumulative(options), spaced(options, steps).astype(int)
    now, after = _at(options, bars, t), _at(options, bars, np.append(t[1:], -1))
    beta = 1 - now / after
    kept = _over(1 - after, 1 - now)
    least = np.maximum(kept * beta, 1e-20)
    # 0 at timestep 0, where no noise is added. Otherwise, the exponential of an extreme prediction could give 0 times
    # infinity.
    logs = np.where(t[:, None] > 0, np.log(np.stack([least, np.maximum(beta, 1e-20)], 1)), 0)
    deviation = {
        "fixed_small": np.sqrt(least),
        "fixed_small_log": np.sqrt(least),
        "fixed_large": np.sqrt(beta),
        "learned_range": np.ones_like(beta),
    }[options["variance_type"]]
    solver = multistep(
        len(t),
        m=x0_form(options, np.sqrt(now), np.sqrt(1 - now)),
        clip=clip_of(options),
        threshold=threshold(options, len(t)),
        # The usual form, beta / (1 - now), would be 0/0 where there is no noise.
        x=(np.sqrt(now / after) * kept, np.sqrt(after) * (1 - now / after * kept)),
        noise=np.where(t > 0, deviation, 0),
        log_variance=logs if options["variance_type"] == "learned_range" else 0.0,
    )
    return table(t, solver, shares=(np.sqrt(now), np.sqrt(1 - now)))


# {order: weights} for the Adams-Bashforth method with equal steps.
_ADAMS = np.array(
    [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], np.array([55, -59, 37, -9]) / 24]
)


def pndm(options: Options, steps: int) -> Row:
    """Returns the table for PNDM (Liu et al. 2022).

    PNDM starts with twelve Runge-Kutta calls (algorithm 2). With `skip_prk_steps`, it starts with lower orders instead,
    as in Katherine Crowson's sampler. The linear multi-step formula (eq. 12) follows.

    The memory holds the network's outputs. With v-prediction, the weighted mean of the outputs is converted to eps at
    the start of the step.

    If sampling begins after the first step, the first calls that run use the lower orders, as in diffusers. The second
    of these calls repeats the first step although the step's timestep appears only once, so every later call gets the x
    that belongs to the previous timestep. The Runge-Kutta start uses only the steps that run, whereas diffusers also
    uses timesteps of steps that do not run.
    """
    if "timesteps" in options:
        raise ValueError("PNDM needs steps of equal length; give a number of steps, not timesteps")
    bars, stride = cumulative(options), options["num_train_timesteps"] // steps
    plan = _low_orders if options["skip_prk_steps"] else _runge_kutta
    t, begin, end, restart, weights, remember = plan(
        spaced(options, steps).astype(int), stride, options.get("begin", 0)
    )
    now, after = _at(options, bars, begin), _at(options, bars, end)
    # The coefficient of eps in eq. 9.
    slope = -_over(after - now, now * np.sqrt(1 - after) + np.sqrt(now * (1 - now) * after))
    from_x, from_output = eps_form(options, np.sqrt(now), np.sqrt(1 - now))
    solver = multistep(
        len(t),
        start=(~restart, restart, 0.0),
        x=(np.sqrt(after / now) + slope * from_x, (slope * from_output)[:, None] * weights),
        remember=remember,
        memory=weights.shape[1] - 1,
    )
    here = _at(options, bars, t)
    return table(t, solver, shares=(np.sqrt(here), np.sqrt(1 - here)))


def _low_orders(t: np.ndarray, stride: int, begin: int) -> tuple:
    """Plans the calls for a start with lower orders.

    The network is called twice at the second timestep. The second of these calls repeats the first step with the mean
    of the outputs at both ends of the step.
    """
    t = np.concatenate([t[:2], t[1:2], t[2:]])[begin:]
    call = np.arange(len(t))
    restart = call == 1
    weights = np.insert(_ADAMS, 1, [1 / 2, 1 / 2, 0, 0], 0)[np.minimum(call, 4)]
    return t, np.where(restart, t + stride, t), np.where(restart, t, t - stride), restart, weights, ~restart


def _runge_kutta(t: np.ndarray, stride: int, begin: int) -> tuple:
    """Plans the calls for a start with three Runge-Kutta steps.

    Each of these steps makes four calls: one at its beginning, two at its midpoint and one at its end.
    """
    t = t[begin:]
    if len(t) < 4:
        raise ValueError(
            f"{assignment('steps', len(t))} should be at least 4: without skip_prk_steps, the first three are"
            " Runge-Kutta steps"
        )
    half = stride // 2
    stages = np.concatenate([[a, b + half, b + half, b] for a, b in itertools.pairwise(t[:4])])
    end = np.concatenate([stages - np.tile([half, 0, half, 0], 3), t[3:] - stride])
    start = np.concatenate([np.repeat(t[:3], 4), t[3:]])
    t = np.concatenate([stages, t[3:]])
    call = np.arange(len(t))
    restart = (call < 12) & (call % 4 != 0)
    weights = np.zeros((len(t), 13))
    weights[:12, 0] = 1
    weights[3:12:4, :4] = [1 / 6, 1 / 3, 1 / 3, 1 / 6]
    for c in range(12, len(t)):
        # Only the outputs of the Runge-Kutta calls at the beginning of a step are remembered.
        used = [k for k in range(c, -1, -1) if k >= 12 or k % 4 == 0][:4]
        weights[c, [c - k for k in used]] = _ADAMS[3]
    return t, start, end, restart, weights, True


def ipndm(options: Options, steps: int) -> Row:
    """Returns the table for IPNDM: PNDM's linear multi-step formula (Liu et al. 2022, eq. 12), with lower orders first.

    IPNDM is for networks that predict v = a eps - b x0 at times t from 1 to 0. The steps start at evenly spaced times,
    and b = sin²(pi t / 2) at a start time t. At the first step, there is no signal (a = 0), and the next x is only
    noise, as in diffusers.
    """
    if "timesteps" in options:
        raise ValueError("IPNDM determines its own times from 1 to 0; give a number of steps, not timesteps")
    if steps == 1:
        raise ValueError(
            f"with {assignment('steps', 1)}, IPNDM would ignore the network's output; use at least 2 steps"
        )
    noise = np.sin(np.linspace(1, 0, steps + 1) * math.pi / 2) ** 2
    signal = np.sqrt(1 - noise**2)
    ratio = _over(signal[1:], signal[:-1])
    call = np.maximum(np.arange(steps) - options.get("begin", 0), 0)
    weights = (noise[1:] - noise[:-1] * ratio)[:, None] * _ADAMS[np.minimum(call, 3)]
    solver = multistep(steps, m=(noise[:-1], signal[:-1]), x=(ratio, weights))
    times = np.arctan2(noise, signal)[:-1] / math.pi * 2
    return table(times, solver, shares=(signal[:-1], noise[:-1]))
