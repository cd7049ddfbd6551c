"""Euler and multi-step DPM-Solver++ tables for networks trained with EDM's preconditioning (Karras et al. 2022, table 1
and section 5), such as Playground 2.5.

The state is x0 + sigma eps. The network's input is the state divided by sqrt(sigma² + sigma_data²), its timestep is
log(sigma) / 4, and x and the output are combined with the weights c_skip and c_out. There are no betas: sigma falls
from `sigma_max` to `sigma_min`, and `num_train_timesteps` only limits the number of steps.
"""

import math

import numpy as np

from sega_jax.method.schedules.calls import MultistepRow, Row, multistep, table
from sega_jax.method.schedules.exponential import dpm_multistep, path_of
from sega_jax.method.schedules.spacing import Options


def _sigmas(options: Options, steps: int) -> np.ndarray:
    """Returns descending sigmas [steps + 1], including the final one, spaced according to eq. 5 or geometrically."""
    if "timesteps" in options:
        raise ValueError("EDM schedulers determine their own noise levels; give a number of steps, not timesteps")
    low, high, rho = options["sigma_min"], options["sigma_max"], options["rho"]
    if options["sigma_schedule"] == "karras":
        ramp = np.linspace(0, 1, steps)
        sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    elif steps == 1:
        raise ValueError(
            "sigma_schedule='exponential' with one step would start at the lowest noise level; use at least 2 steps"
        )
    else:
        sigmas = np.exp(np.linspace(math.log(low), math.log(high), steps))[::-1]
    return np.append(sigmas, sigmas[-1] if options["final_sigmas_type"] == "sigma_min" else 0.0)


def _x0(options: Options, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (c_skip, c_out) such that x0 = c_skip x + c_out output."""
    data = options["sigma_data"]
    out = sigma * data / np.hypot(sigma, data)
    return data**2 / (sigma**2 + data**2), -out if options["prediction_type"] == "v_prediction" else out


def _table(options: Options, sigma: np.ndarray, solver: MultistepRow) -> Row:
    return table(
        0.25 * np.log(sigma),
        solver,
        input_scale=1 / np.hypot(sigma, options["sigma_data"]),
        initial_scale=math.hypot(options["sigma_max"], 1),
        shares=(1.0, sigma),
    )


def euler(options: Options, steps: int) -> Row:
    """Returns the table for Euler steps (Karras et al. 2022, algorithm 2 without churn or second-order correction)."""
    sigmas = _sigmas(options, steps)
    skip, out = _x0(options, sigmas[:-1])
    solver = multistep(steps, m=((1 - skip) / sigmas[:-1], -out / sigmas[:-1]), x=(1.0, np.diff(sigmas)))
    return _table(options, sigmas[:-1], solver)


def dpm_solver(options: Options, steps: int) -> Row:
    """Returns the table for multi-step DPM-Solver++ (Lu et al. 2022) of order 1 to 3, with alpha = 1.

    "sde" adds the noise of the reverse diffusion process. With `final_sigmas_type` "sigma_min", the last step leaves x
    unchanged, as in diffusers.
    """
    sigmas = _sigmas(options, steps)
    path = path_of(np.zeros(steps), np.ones(steps + 1), sigmas)
    return _table(options, sigmas[:-1], dpm_multistep(options, path, _x0(options, sigmas[:-1])))
