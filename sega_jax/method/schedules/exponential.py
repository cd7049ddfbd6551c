"""Tables of the exponential integrators: DPM-Solver and DPM-Solver++ (Lu et al. 2022), UniPC (Zhao et al. 2023).

Along lambda = log(alpha / sigma), where x = alpha x0 + sigma eps and alpha² + sigma² = 1, they integrate
the linear part exactly and what is left by the last x0 (or eps), which is what they remember.
"""

import math
from typing import NamedTuple

import numpy as np

from sega_jax.method.schedules.calls import Row, multistep, table
from sega_jax.method.schedules.ddim_ddpm_pndm import eps_form, threshold, x0_form
from sega_jax.method.schedules.spacing import Options, cumulative, respaced, sigmas_of, spaced_before_end, timesteps_of


class _Path(NamedTuple):
    timesteps: np.ndarray  # [calls]
    alpha: np.ndarray  # [calls + 1]
    sigma: np.ndarray  # [calls + 1]
    log_snr: np.ndarray  # [calls + 1], lambda; infinite where sigma is 0


def _path(options: Options, steps: int, *, unipc: bool = False) -> _Path:
    schedule = sigmas_of(cumulative(options))
    # Up to the least lambda: the cosine schedule's last ones are beyond float32.
    total = int((-np.log(schedule) >= options.get("lambda_min_clipped", -math.inf)).sum())
    t = spaced_before_end(options, steps, total)
    sigmas, last = np.interp(t, np.arange(len(schedule)), schedule), schedule[0]
    other = respaced(options, schedule[::-1], steps)
    if other is not None:
        sigmas, t = other, timesteps_of(other, schedule)
        if options["use_karras_sigmas"] and (unipc or options["beta_schedule"] != "squaredcos_cap_v2"):
            t = t.round()
        last = other[-1] if unipc else last
    sigmas = np.append(sigmas, last if options["final_sigmas_type"] == "sigma_min" else 0.0)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    with np.errstate(divide="ignore"):
        return _Path(np.floor(t), alpha, sigmas * alpha, -np.log(sigmas))


def dpm_solver(options: Options, steps: int) -> Row:
    """Multi-step of order 1 to 3, the slope by "midpoint" or "heun"; "sde" adds the reverse diffusion's noise."""
    path = _path(options, steps)
    count, kind = len(path.timesteps), options["algorithm_type"]
    from_x, noise, weights = np.zeros(count), np.zeros(count), np.zeros((count, 3))
    few = options["lower_order_final"] and count < 15
    begin = options.get("begin", 0)
    for i in range(begin, count):
        order = min(options["solver_order"], i - begin + 1)
        if i == count - 1 and (options["euler_at_final"] or few or options["final_sigmas_type"] == "zero"):
            order = 1
        elif i == count - 2 and few:
            order = min(order, 2)
        from_x[i], noise[i], value, slope, bend = _dpm_gains(kind, path, i)
        h = np.diff(path.log_snr[max(i + 1 - order, 0) : i + 2])[::-1]
        weights[i, 0] = value
        if order > 1:
            # In units of this step: m' by the last two outputs, m'' by the last three.
            first = h[0] / h[1] * np.array([1, -1, 0])
            if order == 2:
                weights[i] += (value / 2 if options["solver_type"] == "midpoint" else slope) * first
            else:
                second = (first - h[0] / h[2] * np.array([0, 1, -1])) / (h[1] + h[2])
                weights[i] += slope * (first + h[1] * second) + bend * h[0] * second
    form = x0_form if kind.endswith("++") else eps_form
    solver = multistep(
        count,
        m=form(options, path.alpha[:-1], path.sigma[:-1]),
        threshold=threshold(options, count),
        x=(from_x, weights),
        noise=noise,
    )
    return table(path.timesteps, solver, shares=(path.alpha[:-1], path.sigma[:-1]))


def _dpm_gains(kind: str, path: _Path, i: int) -> tuple[float, float, float, float, float]:
    """From point i to i + 1: the coefficients of x, of fresh noise, and of the remembered quantity, its slope and
    its bend over the step. The last two mean nothing where the step is infinite."""
    (alpha, alpha_to), (sigma, sigma_to) = path.alpha[i : i + 2], path.sigma[i : i + 2]
    h = path.log_snr[i + 1] - path.log_snr[i]
    sde = kind.startswith("sde")
    with np.errstate(invalid="ignore"):
        if kind.endswith("++"):
            # The noise that is put back is taken from x first: twice the exponent.
            g = 2 * h if sde else h
            decay = np.expm1(-g)
            from_x = sigma_to / sigma * (np.exp(-h) if sde else 1)
            noise = sigma_to * math.sqrt(-decay) if sde else 0.0
            return from_x, noise, *(-alpha_to * np.array([decay, -decay / g - 1, (decay + g) / g**2 - 1 / 2]))
        growth = np.expm1(h)
        noise = sigma_to * math.sqrt(np.expm1(2 * h)) if sde else 0.0
        scale = -sigma_to * (2 if sde else 1)
        return alpha_to / alpha, noise, *(scale * np.array([growth, growth / h - 1, (growth - h) / h**2 - 1 / 2]))


def unipc(options: Options, steps: int) -> Row:
    """Predictor (UniP) and corrector (UniC), B(h) being h ("bh1") or exp(h) - 1 ("bh2").

    The corrector takes the last step anew with the output at its end; the predictor goes on from there.
    """
    path = _path(options, steps, unipc=True)
    count, most = len(path.timesteps), options["solver_order"]
    start, corrected = np.zeros((count, 2)), np.zeros((count, 1 + most))
    from_start, weights = np.zeros(count), np.zeros((count, 1 + most))
    order, begin = 0, options.get("begin", 0)
    for i in range(begin, count):
        if i > begin and i - 1 not in options["disable_corrector"]:
            start[i, 1], corrected[i] = _unipc_step(options, path, i - 1, order, corrects=True)
        else:
            start[i, 0] = 1
        order = min(most, count - i if options["lower_order_final"] else most, i - begin + 1)
        from_start[i], (*weights[i, :most], _) = _unipc_step(options, path, i, order, corrects=False)
    form = x0_form if options["predict_x0"] else eps_form
    solver = multistep(
        count,
        m=form(options, path.alpha[:-1], path.sigma[:-1]),
        threshold=threshold(options, count),
        start=(start[:, 0], start[:, 1], corrected),
        x=(from_start, weights),
    )
    return table(path.timesteps, solver, shares=(path.alpha[:-1], path.sigma[:-1]))


def _unipc_step(options: Options, path: _Path, i: int, order: int, *, corrects: bool) -> tuple[float, np.ndarray]:
    """From point i to i + 1: the coefficient of x at i, and those of what is remembered [1 + most], newest first:
    from point i + 1 on if it corrects, else from i on."""
    (alpha, alpha_to), (sigma, sigma_to) = path.alpha[i : i + 2], path.sigma[i : i + 2]
    h = path.log_snr[i + 1] - path.log_snr[i]
    data = options["predict_x0"]
    hh, scale, from_x = (-h, alpha_to, sigma_to / sigma) if data else (h, sigma_to, alpha_to / alpha)
    growth = np.expm1(hh)
    bound = hh if options["solver_type"] == "bh1" else growth
    weights = np.zeros(2 + options["solver_order"])  # from point i + 1 on
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
        # At their lowest orders the paper takes 1/2, which is right to the order at any B.
        rho = np.array([0.5]) if unknown == 1 else solved
        for k, (r, ratio) in enumerate(zip(rho, ratios, strict=False), 1):
            weights[0 if k == order else k + 1] -= scale * bound * r / ratio
            weights[1] += scale * bound * r / ratio
    return from_x, weights[:-1] if corrects else weights[1:]
