"""Tables for the samplers that run few-step distilled networks: LCM (Luo et al. 2023) and TCD (Zheng et al. 2024).

The network was distilled at `original_inference_steps` evenly spaced timesteps, and the samplers use a subset of these
timesteps. As in diffusers, `timestep_spacing` and `steps_offset` have no effect.
"""

import numpy as np

from sega_jax.method.naming import assignment
from sega_jax.method.schedules.calls import Row, TCDRow, multistep, table
from sega_jax.method.schedules.ddim_ddpm_pndm import clip_of, eps_form, threshold, x0_form
from sega_jax.method.schedules.spacing import Options, cumulative

_SIGMA_DATA = 0.5


def _timesteps(options: Options, steps: int) -> np.ndarray:
    if "timesteps" in options:
        return options["timesteps"]
    count, total = options["original_inference_steps"], options["num_train_timesteps"]
    if steps > count:
        raise ValueError(
            f"{assignment('steps', steps)} should be at most original_inference_steps={count}; use fewer steps"
        )
    distilled = np.arange(count, 0, -1) * (total // count) - 1
    return distilled[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)]


def lcm(options: Options, steps: int) -> Row:
    """Returns the table for multi-step consistency sampling (LCM).

    Every call predicts x0. Except after the last call, fresh noise then takes x back up to the next timestep. The
    boundary condition mixes x0 and x with the weights c_out and c_skip. It matters only at the smallest timesteps.
    """
    bars, t = cumulative(options), _timesteps(options, steps)
    a, b = np.sqrt(bars[t]), np.sqrt(1 - bars[t])
    # After the last call, no noise is added.
    after = np.append(bars[t[1:]], 1.0)
    scaled = t * options["timestep_scaling"]
    skip, out = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2), scaled / np.hypot(scaled, _SIGMA_DATA)
    solver = multistep(
        len(t),
        m=x0_form(options, a, b),
        clip=clip_of(options),
        threshold=threshold(options, len(t)),
        x=(np.sqrt(after) * skip, np.sqrt(after) * out),
        noise=np.sqrt(1 - after),
    )
    return table(t, solver, shares=(a, b))


def tcd(options: Options, steps: int) -> Row:
    """Returns the table for trajectory consistency sampling (TCD), where eta sets how far below the next timestep a
    call goes.

    As in diffusers, sampling ends at timestep 0, so the noise at timestep 0 remains, and `clip_sample` and
    `thresholding` have no effect.
    """
    bars, t = cumulative(options), _timesteps(options, steps)
    a, b = np.sqrt(bars[t]), np.sqrt(1 - bars[t])
    following = np.append(t[1:], 0)
    after = bars[following]
    with np.errstate(divide="ignore"):
        fresh = np.sqrt(np.maximum(1 - after[:, None] / bars, 0))
    row = TCDRow(
        *x0_form(options, a, b),
        *eps_form(options, a, b),
        x0_scale=np.sqrt(after),
        variance=1 - after,
        following=following.astype(np.float64),
        # s is never greater than the next timestep.
        sigma=np.where(np.arange(len(bars)) <= following[:, None], fresh, 0),
    )
    return table(t, row, shares=(a, b))
