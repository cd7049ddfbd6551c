"""Tables of the solvers that step along sigma = noise over signal, after k-diffusion: Euler, Heun, LMS, KDPM2.

Their state is x0 + sigma eps, which the network gets divided by sqrt(sigma² + 1); what they remember is
the derivative d = (x - x0) / sigma, which is eps, but for Heun, which remembers x0. Where betas are zero, sigma is 0
before the end of the schedule: x is x0 already, and calls there leave it as it is.
"""

import math

import numpy as np
from numpy.polynomial import Polynomial

from sega_jax.method.schedules.calls import MultistepRow, Row, multistep, table
from sega_jax.method.schedules.spacing import Options, cumulative, respaced, sigmas_of, spaced, timesteps_of


def _path(options: Options, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps [steps], sigmas [steps + 1]), falling to the final one."""
    schedule = sigmas_of(cumulative(options))
    t = spaced(options, steps, whole=False)
    sigmas = np.interp(t, np.arange(len(schedule)), schedule)
    if options.get("interpolation_type") == "log_linear":
        if "timesteps" in options:
            raise ValueError("interpolation_type='log_linear' spaces the steps itself; give a number, not timesteps")
        # Of steps + 1 points: it ends at the least sigma, whatever `final_sigmas_type` says.
        least = schedule[schedule > 0][0]
        sigmas = np.exp(np.linspace(math.log(schedule[-1]), math.log(least), steps + 1))
    other = respaced(options, sigmas, steps)
    if other is not None:
        sigmas, t = other, timesteps_of(other, schedule)
    last = schedule[0] if options.get("final_sigmas_type") == "sigma_min" else 0.0
    return t, np.append(sigmas, last)[: steps + 1]


def _derivative(options: Options, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) with d = p x + q output; x and x0 say nothing about it where there is no noise, and it counts as 0."""
    if options["prediction_type"] == "v_prediction":
        return sigma / (sigma**2 + 1), 1 / np.sqrt(sigma**2 + 1)
    if options["prediction_type"] == "sample":
        inverse = _inverse(sigma)
        return inverse, -inverse
    return np.zeros_like(sigma), np.ones_like(sigma)


def _x0(options: Options, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) with x0 = p x + q output."""
    p, q = _derivative(options, sigma)
    return 1 - sigma * p, -sigma * q


def _inverse(sigma: np.ndarray) -> np.ndarray:
    """1 / sigma, and 0 where sigma is 0."""
    return np.where(sigma > 0, 1 / np.where(sigma > 0, sigma, 1), 0)


def _table(options: Options, t: np.ndarray, sigma: np.ndarray, solver: MultistepRow) -> Row:
    if options.get("timestep_type") == "continuous" and options["prediction_type"] == "v_prediction":
        t = 0.25 * np.log(np.maximum(sigma, 1e-10))
    # Spaced "leading", x begins with the variance of signal and noise, as diffusers has it.
    initial = np.hypot(sigma.max(), options["timestep_spacing"] == "leading")
    return table(t, solver, input_scale=1 / np.sqrt(sigma**2 + 1), initial_scale=initial, shares=(1.0, sigma))


def euler(options: Options, steps: int) -> Row:
    """Karras et al. 2022, algorithm 2 without churn and its second order."""
    t, sigmas = _path(options, steps)
    solver = multistep(steps, m=_derivative(options, sigmas[:-1]), x=(1.0, np.diff(sigmas)))
    return _table(options, t, sigmas[:-1], solver)


def euler_ancestral(options: Options, steps: int) -> Row:
    """Euler to a lower sigma, and fresh noise back up to the next one."""
    t, sigmas = _path(options, steps)
    down, up = _ancestral(sigmas)
    solver = multistep(steps, m=_derivative(options, sigmas[:-1]), x=(1.0, down - sigmas[:-1]), noise=up)
    return _table(options, t, sigmas[:-1], solver)


def _ancestral(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) [steps]: the sigma that a step goes down to, and of the noise that takes it up to the next one."""
    now, after = sigmas[:-1], sigmas[1:]
    up = np.sqrt(after**2 * np.maximum(1 - (after * _inverse(now)) ** 2, 0))
    return np.sqrt(np.maximum(after**2 - up**2, 0)), up


def heun(options: Options, steps: int) -> Row:
    """Karras et al. 2022, algorithm 1 without churn: 2 steps - 1 calls, since every step but the last has two."""
    t, sigmas = _path(options, steps)
    call = np.arange(2 * steps - 1)
    second, at = call % 2 == 1, (call + 1) // 2
    now, before, after = sigmas[at], sigmas[at - 1], sigmas[np.minimum(at + 1, steps)]
    # What is remembered is x0, which the config may clip: d = (x - x0) / sigma. A step that ends without noise stays
    # Euler's, as the last one.
    corrects = second & (now > 0)
    whole, half = (after - now) * _inverse(now), (now - before) / 2
    begun, ended = np.where(corrects, half * _inverse(before), 0), np.where(corrects, half * _inverse(now), 0)
    solver = multistep(
        len(call),
        m=_x0(options, now),
        clip=options["clip_sample_range"] if options["clip_sample"] else math.inf,
        start=(np.where(corrects, ended, 1), np.where(corrects, 1 + begun, 0), 0.0),
        x=(np.where(second, 1, 1 + whole), np.stack([-np.where(second, ended, whole), -begun], 1)),
    )
    return _table(options, t[at], now, solver)


def kdpm2(options: Options, steps: int) -> Row:
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1) in sigma, after k-diffusion: 2 steps - 1 calls, since every step but
    the last has a second one in its logarithmic middle, whose derivative takes the whole step."""
    return _in_the_middle(options, steps, ancestral=False)


def kdpm2_ancestral(options: Options, steps: int) -> Row:
    """The ancestral form of `kdpm2`: steps to a lower sigma, then adds noise up to the next one."""
    return _in_the_middle(options, steps, ancestral=True)


def _in_the_middle(options: Options, steps: int, *, ancestral: bool) -> Row:
    t, sigmas = _path(options, steps)
    t = t.round() if options["use_karras_sigmas"] else t
    down, up = _ancestral(sigmas) if ancestral else (sigmas[1:], np.zeros(steps))
    middle = np.sqrt(sigmas[:-1] * down)  # 0 where the step ends without noise, which is then Euler's
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
    """Adams-Bashforth on uneven steps: the polynomial through the last derivatives, integrated exactly;
    diffusers integrates by quadrature, to about 1e-8."""
    if options["use_karras_sigmas"]:
        # As in diffusers, only the other spacings read the ends that a config of another class may have.
        options = {key: value for key, value in options.items() if key not in ("sigma_min", "sigma_max")}
    t, sigmas = _path(options, steps)
    weights = np.zeros((steps, order))
    for i, step in enumerate(np.diff(sigmas)):
        if not step:
            continue
        # In units of this step from its beginning, where nothing cancels.
        nodes = (sigmas[max(i - order + 1, 0) : i + 1][::-1] - sigmas[i]) / step
        # Of calls with the same noise, the newest counts.
        kept = [k for k, node in enumerate(nodes) if node not in nodes[:k]]
        for k in kept:
            node, others = nodes[k], nodes[[other for other in kept if other != k]]
            basis = math.prod((Polynomial([-other, 1]) / (node - other) for other in others), start=Polynomial([1]))
            weights[i, k] = step * basis.integ()(1)
    return _table(options, t, sigmas[:-1], multistep(steps, m=_derivative(options, sigmas[:-1]), x=(1.0, weights)))
