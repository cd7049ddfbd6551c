"""Tables for the exponential integrators: DPM-Solver and DPM-Solver++ (Lu et al. 2022), DEIS (Zhang & Chen 2023), and
UniPC (Zhao et al. 2023).

Here x = alpha x0 + sigma eps with alpha² + sigma² = 1, and lambda = log(alpha / sigma). These solvers integrate the
linear part exactly along lambda and approximate the rest from the x0 (or eps) of the last calls. If some betas are
zero, sigma is 0 before the end of the schedule. From there on, x is x0, and calls leave it unchanged.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

from sega_jax.method.schedules.calls import MultistepRow, Row, multistep, table
from sega_jax.method.schedules.ddim_ddpm_pndm import eps_form, threshold, x0_form
from sega_jax.method.schedules.spacing import Options, cumulative, respaced, sigmas_of, spaced_before_end, timesteps_of


class NoisePath(NamedTuple):
    """The noise levels through which a solver steps, as float64 arrays."""

    timesteps: np.ndarray  # [calls]
    alpha: np.ndarray  # [calls + 1], the share of signal
    sigma: np.ndarray  # [calls + 1], the share of noise
    log_snr: np.ndarray  # [calls + 1], lambda; infinite where sigma is 0


def path_of(timesteps: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> NoisePath:
    """Returns the path with the given timesteps [calls] and shares of signal and noise [calls + 1]."""
    with np.errstate(divide="ignore"):
        return NoisePath(timesteps, alpha, sigma, np.log(alpha) - np.log(sigma))


def _path(options: Options, steps: int, *, rounded: bool = True, own_end: bool = False) -> NoisePath:
    """Returns the path of a schedule.

    Args:
        rounded: Whether to round the timesteps of Karras sigmas to integers.
        own_end: Whether "sigma_min" means the last respaced sigma instead of the smallest training sigma.
    """
    schedule = sigmas_of(cumulative(options))
    # Leave out timesteps whose lambda is below `lambda_min_clipped`, because values at the last timesteps of the cosine
    # schedule exceed the range of float32.
    with np.errstate(divide="ignore"):
        total = int((-np.log(schedule) >= options.get("lambda_min_clipped", -math.inf)).sum())
    t = spaced_before_end(options, steps, total)
    sigmas, last = np.interp(t, np.arange(len(schedule)), schedule), schedule[0]
    other = respaced(options, schedule[::-1], steps)
    if other is not None:
        sigmas, t = other, timesteps_of(other, schedule)
        t = t.round() if options["use_karras_sigmas"] and rounded else t
        last = other[-1] if own_end else last
    sigmas = np.append(sigmas, last if options["final_sigmas_type"] == "sigma_min" else 0.0)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return path_of(np.floor(t), alpha, sigmas * alpha)


def _distinct(path: NoisePath, i: int, order: int) -> int:
    """Returns the highest possible order of a step from point i, up to `order`.

    A step can use only points with distinct noise levels. Two points have the same noise level where betas are zero, or
    where the same timestep appears twice.
    """
    while order > 1 and not np.diff(path.log_snr[i + 1 - order : i + 1]).all():
        order -= 1
    return order


def _table(options: Options, path: NoisePath, solver: MultistepRow) -> Row:
    return table(path.timesteps, solver, shares=(path.alpha[:-1], path.sigma[:-1]))


def _form(options: Options, path: NoisePath, *, data: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns (p, q) such that p x + q output is x0 if `data` is true, otherwise eps."""
    return (x0_form if data else eps_form)(options, path.alpha[:-1], path.sigma[:-1])


def dpm_solver(options: Options, steps: int) -> Row:
    """Returns the table for multi-step DPM-Solver of order 1 to 3.

    The option "midpoint" or "heun" selects the formula for the slope, and "sde" adds the noise of the reverse diffusion
    process.
    """
    path = _path(options, steps, rounded=options["beta_schedule"] != "squaredcos_cap_v2")
    form = _form(options, path, data=options["algorithm_type"].endswith("++"))
    return _table(options, path, dpm_multistep(options, path, form))


def dpm_multistep(options: Options, path: NoisePath, form: tuple[np.ndarray, np.ndarray]) -> MultistepRow:
    """Returns the coefficients of multi-step DPM-Solver along any path.

    Args:
        form: (p, q), each [calls], such that p x + q output is the remembered quantity.
    """
    count, kind = len(path.timesteps), options["algorithm_type"]
    from_x, noise, weights = np.zeros(count), np.zeros(count), np.zeros((count, 3))
    few = options["lower_order_final"] and count < 15
    begin = options.get("begin", 0)
    for i in range(begin, count):
        order = min(options["solver_order"], i - begin + 1)
        if path.sigma[i + 1] == 0 or (i == count - 1 and (options["euler_at_final"] or few)):
            order = 1
        elif i == count - 2 and few:
            order = min(order, 2)
        order = _distinct(path, i, order)
        from_x[i], noise[i], value, slope, bend = _dpm_gains(kind, path, i, i + 1)
        with np.errstate(invalid="ignore"):
            h = np.diff(path.log_snr[max(i + 1 - order, 0) : i + 2])[::-1]
        weights[i, 0] = value
        if order > 1:
            # Derivatives in units of this step: m' from the last two outputs, m'' from the last three.
            first = h[0] / h[1] * np.array([1, -1, 0])
            if order == 2:
                weights[i] += (value / 2 if options["solver_type"] == "midpoint" else slope) * first
            else:
                second = (first - h[0] / h[2] * np.array([0, 1, -1])) / (h[1] + h[2])
                weights[i] += slope * (first + h[1] * second) + bend * h[0] * second
    return multistep(count, m=form, threshold=threshold(options, count), x=(from_x, weights), noise=noise)


def dpm_singlestep(options: Options, steps: int) -> Row:
    """Returns the table for single-step DPM-Solver.

    Each step has `solver_order` calls. Each call starts from the beginning of its step and uses the step's outputs so
    far. If calls remain at the end, they form a step of lower order. If sampling begins later in the schedule, the
    first step may also be of lower order.

    In a stochastic step of order 3 with "heun", the bend (second derivative) has the same sign as in diffusers, so the
    step is accurate only to first order.
    """
    path = _path({**options, "timestep_spacing": "linspace"}, steps)
    kind, begin = options["algorithm_type"], options.get("begin", 0)
    from_x, noise, weights, orders = np.zeros(steps), np.zeros(steps), np.zeros((steps, 3)), np.ones(steps, int)
    for i in range(begin, steps):
        lower = i == steps - 1 and options["lower_order_final"] and steps % options["solver_order"] == 0
        listed = 1 if lower or path.sigma[i + 1] == 0 else i % options["solver_order"] + 1
        orders[i] = order = _distinct(path, i, min(listed, i - begin + 1))
        start = i - order + 1
        from_x[i], noise[i], value, slope, bend = _dpm_gains(kind, path, start, i + 1)
        if order == 1:
            weights[i, 0] = value
            continue
        # The positions of the outputs as fractions of the step, and the slopes from the last two outputs.
        span = path.log_snr[start : i + 2] - path.log_snr[start]
        if order == 2:
            r = span[1] / span[2]
            weights[i] = (value if options["solver_type"] == "midpoint" else 2 * slope) / 2 / r * np.array([1, -1, 0])
            weights[i, 1] += value
        else:
            before, last = span[1] / span[3], span[2] / span[3]
            by_last, by_before = np.array([1, 0, -1]) / last, np.array([0, 1, -1]) / before
            weights[i] = slope * by_last
            if options["solver_type"] == "heun":
                bend -= path.alpha[i + 1] if kind.startswith("sde") else 0
                weights[i] = slope * (last * by_before - before * by_last) / (last - before)
                weights[i] += bend * 2 * (by_last - by_before) / (last - before)
            weights[i, 2] += value
    first = orders == 1
    solver = multistep(
        steps,
        m=_form(options, path, data=kind.endswith("++")),
        threshold=threshold(options, steps),
        start=(first, ~first, 0.0),
        x=(from_x, weights),
        noise=noise,
    )
    return _table(options, path, solver)


def _dpm_gains(kind: str, path: NoisePath, i: int, j: int) -> tuple[float, float, float, float, float]:
    """Returns the five coefficients of a step from point i to j.

    They multiply x, the fresh noise, the remembered quantity, and its slope and bend (second derivative) over the step.
    The last two are meaningless if the step in lambda is infinite.
    """
    (alpha, alpha_to), (sigma, sigma_to) = path.alpha[[i, j]], path.sigma[[i, j]]
    if sigma == sigma_to:
        return alpha_to / alpha, 0.0, 0.0, 0.0, 0.0  # also applies to steps between two points without noise
    h = path.log_snr[j] - path.log_snr[i]
    sde = kind.startswith("sde")
    with np.errstate(invalid="ignore"):
        if kind.endswith("++"):
            # The stochastic step first removes as much noise as it adds, which doubles the exponent.
            g = 2 * h if sde else h
            decay = np.expm1(-g)
            from_x = sigma_to / sigma * (np.exp(-h) if sde else 1)
            noise = sigma_to * math.sqrt(-decay) if sde else 0.0
            return from_x, noise, *(-alpha_to * np.array([decay, -decay / g - 1, (decay + g) / g**2 - 1 / 2]))
        if sigma_to == 0:
            return alpha_to / alpha, 0.0, -alpha_to * sigma / alpha, 0.0, 0.0
        growth = np.expm1(h)
        noise = sigma_to * math.sqrt(np.expm1(2 * h)) if sde else 0.0
        scale = -sigma_to * (2 if sde else 1)
        return alpha_to / alpha, noise, *(scale * np.array([growth, growth / h - 1, (growth - h) / h**2 - 1 / 2]))


def deis(options: Options, steps: int) -> Row:
    """Returns the table for DEIS (Zhang & Chen 2023) of order 1 to 3 in log rho, where rho = sigma / alpha.

    DEIS interpolates the last values of eps with a polynomial in log rho and integrates the polynomial over rho
    exactly. It ends at the smallest training sigma. With `use_karras_sigmas` or another spacing of sigmas, it ends at
    the last of the respaced sigmas, and the last step leaves x unchanged.
    """
    path = _path({**options, "final_sigmas_type": "sigma_min"}, steps, own_end=True)
    weights, begin = np.zeros((steps, 3)), options.get("begin", 0)
    few = options["lower_order_final"] and steps < 15
    for i in range(begin, steps):
        order = _distinct(path, i, min(options["solver_order"], i - begin + 1, steps - i if few else 3))
        if path.sigma[i] == path.sigma[i + 1]:
            continue
        h = path.log_snr[i] - path.log_snr[i + 1]
        # The integrals of s^k e^s from 0 to h, where s is log rho relative to the start of the step.
        grown = np.exp(h)
        edge = h * grown if grown else 0.0
        moments = np.array([np.expm1(h), edge - np.expm1(h), (h * edge if grown else 0.0) - 2 * (edge - np.expm1(h))])
        nodes = path.log_snr[i] - path.log_snr[i - np.arange(order)]
        for k, node in enumerate(nodes):
            others = np.delete(nodes, k)
            basis = math.prod((Polynomial([-other, 1]) / (node - other) for other in others), start=Polynomial([1]))
            weights[i, k] = path.alpha[i + 1] * path.sigma[i] / path.alpha[i] * (basis.coef @ moments[:order])
    solver = multistep(
        steps,
        m=_form(options, path, data=False),
        threshold=threshold(options, steps),
        x=(path.alpha[1:] / path.alpha[:-1], weights),
    )
    return _table(options, path, solver)


def unipc(options: Options, steps: int) -> Row:
    """Returns the table for UniPC, a predictor (UniP) with a corrector (UniC).

    B(h) is h for "bh1" and exp(h) - 1 for "bh2". The corrector repeats the last step with the output from the end of
    that step, and the predictor continues from the result.
    """
    path = _path(options, steps, own_end=True)
    count, most = len(path.timesteps), options["solver_order"]
    start, corrected = np.zeros((count, 2)), np.zeros((count, 1 + most))
    from_start, weights = np.zeros(count), np.zeros((count, 1 + most))
    order, begin = 0, options.get("begin", 0)
    for i in range(begin, count):
        if i > begin and i - 1 not in options["disable_corrector"] and path.sigma[i] > 0:
            start[i, 1], corrected[i] = _unipc_step(options, path, i - 1, order, corrects=True)
        else:
            start[i, 0] = 1
        order = min(most, count - i if options["lower_order_final"] else most, i - begin + 1)
        order = _distinct(path, i, order) if path.sigma[i + 1] > 0 else 1
        from_start[i], (*weights[i, :most], _) = _unipc_step(options, path, i, order, corrects=False)
    solver = multistep(
        count,
        m=_form(options, path, data=options["predict_x0"]),
        threshold=threshold(options, count),
        start=(start[:, 0], start[:, 1], corrected),
        x=(from_start, weights),
    )
    return _table(options, path, solver)


def _unipc_step(options: Options, path: NoisePath, i: int, order: int, *, corrects: bool) -> tuple[float, np.ndarray]:
    """Returns the coefficients of a step from point i to i + 1.

    They multiply x at point i and the remembered quantities [1 + solver_order], newest first. The newest quantity
    belongs to point i + 1 in the corrector, and to point i in the predictor.
    """
    (alpha, alpha_to), (sigma, sigma_to) = path.alpha[i : i + 2], path.sigma[i : i + 2]
    data, weights = options["predict_x0"], np.zeros(2 + options["solver_order"])  # weights[0] belongs to point i + 1
    if sigma == sigma_to or (sigma_to == 0 and not data):
        weights[1] = sigma_to - alpha_to * sigma / alpha
        return alpha_to / alpha, weights[:-1] if corrects else weights[1:]
    h = path.log_snr[i + 1] - path.log_snr[i]
    hh, scale, from_x = (-h, alpha_to, sigma_to / sigma) if data else (h, sigma_to, alpha_to / alpha)
    growth = np.expm1(hh)
    bound = hh if options["solver_type"] == "bh1" else growth
    weights[1] = -scale * growth
    ratios = np.array([*((path.log_snr[i - k] - path.log_snr[i]) / h for k in range(1, order)), 1.0])
    unknown = order if corrects else order - 1
    if unknown:
        # Theorem 3.1: the weights of the differences match the Taylor expansion of the integral.
        phi, right = growth / hh - 1 if np.isfinite(hh) else -1.0, []
        for k in range(1, order + 1):
            right.append(phi * math.factorial(k) / bound)
            phi = (phi / hh if np.isfinite(hh) else 0.0) - 1 / math.factorial(k + 1)
        matrix = ratios ** np.arange(unknown)[:, None]
        solved = np.linalg.solve(matrix[:, :unknown], right[:unknown])
        # At the lowest orders, the paper uses 1/2, which gives the right order for every B.
        rho = np.array([0.5]) if unknown == 1 else solved
        for k, (r, ratio) in enumerate(zip(rho, ratios, strict=False), 1):
            weights[0 if k == order else k + 1] -= scale * bound * r / ratio
            weights[1] += scale * bound * r / ratio
    return from_x, weights[:-1] if corrects else weights[1:]
