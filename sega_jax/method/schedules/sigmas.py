"""Tables for the solvers that step along sigma = noise / signal, as in k-diffusion: Euler, Heun, LMS and KDPM2.

The state is x0 + sigma eps, and the network's input is the state divided by sqrt(sigma² + 1). These solvers remember
the derivative d = (x - x0) / sigma, which is eps; only Heun remembers x0. If some betas are zero, sigma is 0 before the
end of the schedule. From there on, x is x0, and calls leave it unchanged.
"""

import math

import numpy as np
from numpy.polynomial import Polynomial

from sega_jax.method.schedules.calls import MultistepRow, Row, multistep, table
from sega_jax.method.schedules.spacing import Options, cumulative, respaced, sigmas_of, spaced, timesteps_of


def _path(options: Options, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (timesteps [steps], sigmas [steps + 1]), both descending. The sigmas include the final one."""
    schedule = sigmas_of(cumulative(options))
    t = spaced(options, steps, rounded=False)
    sigmas = np.interp(t, np.arange(len(schedule)), schedule)
    if options.get("interpolation_type") == "log_linear":
        if "timesteps" in options:
            raise ValueError(
                "interpolation_type='log_linear' determines the timesteps; give a number of steps, not timesteps"
            )
        # The last of the (steps + 1) points is the smallest sigma, whatever the `final_sigmas_type`.
        least = schedule[schedule > 0][0]
        sigmas = np.exp(np.linspace(math.log(schedule[-1]), math.log(least), steps + 1))
    other = respaced(options, sigmas, steps)
    if other is not None:
        sigmas, t = other, timesteps_of(other, schedule)
    last = schedule[0] if options.get("final_sigmas_type") == "sigma_min" else 0.0
    return t, np.append(sigmas, last)[: steps + 1]


def _derivative(options: Options, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (p, q) with d = p x + q output. Without noise, d cannot be computed from x and x0, so it is set to 0."""
    if options["prediction_type"] == "v_prediction":
        return sigma / (sigma**2 + 1), 1 / np.sqrt(sigma**2 + 1)
    if options["prediction_type"] == "sample":
        inverse = _inverse(sigma)
        return inverse, -inverse
    return np.zeros_like(sigma), np.ones_like(sigma)


def _x0(options: Options, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (p, q) with x0 = p x + q output."""
    p, q = _derivative(options, sigma)
    return 1 - sigma * p, -sigma * q


def _inverse(sigma: np.ndarray) -> np.ndarray:
    """Returns 1 / sigma, or 0 where sigma is 0."""
    return np.where(sigma > 0, 1 / np.where(sigma > 0, sigma, 1), 0)


def _table(options: Options, t: np.ndarray, sigma: np.ndarray, solver: MultistepRow) -> Row:
    if options.get("timestep_type") == "continuous" and options["prediction_type"] == "v_prediction":
        t = 0.25 * np.log(np.maximum(sigma, 1e-10))
    # With "leading", the initial variance is the variance of signal plus noise, as in diffusers.
    initial = np.hypot(sigma.max(), options["timestep_spacing"] == "leading")
    return table(t, solver, input_scale=1 / np.sqrt(sigma**2 + 1), initial_scale=initial, shares=(1.0, sigma))


def euler(options: Options, steps: int) -> Row:
    """Returns the table for Euler steps (Karras et al. 2022, algorithm 2 without churn or second-order correction)."""
    t, sigmas = _path(options, steps)
    solver = multistep(steps, m=_derivative(options, sigmas[:-1]), x=(1.0, np.diff(sigmas)))
    return _table(options, t, sigmas[:-1], solver)


def euler_ancestral(options: Options, steps: int) -> Row:
    """Returns the table for ancestral Euler: each step goes to a lower sigma, and fresh noise raises sigma again."""
    t, sigmas = _path(options, steps)
    down, up = _ancestral(sigmas)
    solver = multistep(steps, m=_derivative(options, sigmas[:-1]), x=(1.0, down - sigmas[:-1]), noise=up)
    return _table(options, t, sigmas[:-1], solver)


def _ancestral(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (down, up), each [steps]: the sigma at which a step ends, and the sigma of the noise added after it."""
    now, after = sigmas[:-1], sigmas[1:]
    up = np.sqrt(after**2 * np.maximum(1 - (after * _inverse(now)) ** 2, 0))
    return np.sqrt(np.maximum(after**2 - up**2, 0)), up


def heun(options: Options, steps: int) -> Row:
    """Returns the table for Heun's method (Karras et al. 2022, algorithm 1 without churn).

    It has 2 * steps - 1 calls, because every step except the last has two.
    """
    t, sigmas = _path(options, steps)
    call = np.arange(2 * steps - 1)
    second, at = call % 2 == 1, (call + 1) // 2
    now, before, after = sigmas[at], sigmas[at - 1], sigmas[np.minimum(at + 1, steps)]
    # The solver stores x0, which the config may clip; the derivative is d = (x - x0) / sigma. A step that ends at zero
    # noise, such as the last one, remains an Euler step.
    corrects = second & (now > 0)
    full, half = (after - now) * _inverse(now), (now - before) / 2
    at_start, at_end = np.where(corrects, half * _inverse(before), 0), np.where(corrects, half * _inverse(now), 0)
    solver = multistep(
        len(call),
        m=_x0(options, now),
        clip=options["clip_sample_range"] if options["clip_sample"] else math.inf,
        start=(np.where(corrects, at_end, 1), np.where(corrects, 1 + at_start, 0), 0.0),
        x=(np.where(second, 1, 1 + full), np.stack([-np.where(second, at_end, full), -at_start], 1)),
    )
    return _table(options, t[at], now, solver)


def kdpm2(options: Options, steps: int) -> Row:
    """Returns the table for DPM-Solver-2 (Lu et al. 2022, algorithm 1), which steps along sigma as in k-diffusion.

    It has 2 * steps - 1 calls: every step except the last has a second call at its logarithmic midpoint, and the
    derivative there is used for the entire step.
    """
    return _in_the_middle(options, steps, ancestral=False)


def kdpm2_ancestral(options: Options, steps: int) -> Row:
    """Returns the table for the ancestral form of `kdpm2`, which steps to a lower sigma and then adds noise."""
    return _in_the_middle(options, steps, ancestral=True)


def _in_the_middle(options: Options, steps: int, *, ancestral: bool) -> Row:
    t, sigmas = _path(options, steps)
    t = t.round() if options["use_karras_sigmas"] else t
    down, up = _ancestral(sigmas) if ancestral else (sigmas[1:], np.zeros(steps))
    middle = np.sqrt(sigmas[:-1] * down)  # 0 for a step that ends at zero noise, which is then an Euler step
    call = np.arange(2 * steps - 1)
    second, at = call % 2 == 1, call // 2
    now = np.where(second, middle[at], sigmas[at])
    times = np.where(second, timesteps_of(middle, sigmas_of(cumulative(options)))[at], t[at])
    solver = multistep(
        len(call),
        m=_derivative(options, now),
        start=(~second | (now == 0), second & (now > 0), 0.0),
        x=(1.0, np.where(second, np.where(now > 0, down[at] - sigmas[at], 0), middle[at] - sigmas[at])),
        noise=np.where(second, up[at], 0),
    )
    return _table(options, times, now, solver)


def lms(options: Options, steps: int, order: int = 4) -> Row:
    """Returns the table for LMS, the Adams-Bashforth method for steps of unequal length.

    The polynomial through the last derivatives is integrated exactly. diffusers integrates it numerically, with an
    error of about 1e-8.
    """
    if options["use_karras_sigmas"]:
        # As in diffusers, Karras sigmas ignore `sigma_min` and `sigma_max` from a different class's config.
        options = {key: value for key, value in options.items() if key not in ("sigma_min", "sigma_max")}
    t, sigmas = _path(options, steps)
    weights = np.zeros((steps, order))
    for i, step in enumerate(np.diff(sigmas)):
        if not step:
            continue
        # Nodes are relative to the start of this step and in units of its length, which avoids cancellation errors.
        nodes = (sigmas[max(i - order + 1, 0) : i + 1][::-1] - sigmas[i]) / step
        # If several calls have the same noise level, only the newest is used.
        distinct = [k for k, node in enumerate(nodes) if node not in nodes[:k]]
        for k in distinct:
            node, others = nodes[k], nodes[[other for other in distinct if other != k]]
            basis = math.prod((Polynomial([-other, 1]) / (node - other) for other in others), start=Polynomial([1]))
            weights[i, k] = step * basis.integ()(1)
    return _table(options, t, sigmas[:-1], multistep(steps, m=_derivative(options, sigmas[:-1]), x=(1.0, weights)))
