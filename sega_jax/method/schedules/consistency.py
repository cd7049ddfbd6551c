"""Tables of the samplers of distilled networks, which take few steps: LCM (Luo et al. 2023), TCD (Zheng et al. 2024).

Their timesteps are some of those that the distillation used, `original_inference_steps` evenly spaced ones;
`timestep_spacing` and `steps_offset` mean nothing, as in diffusers.
"""

import numpy as np

from sega_jax.method.schedules.calls import Row, TCDRow, multistep, table
from sega_jax.method.schedules.ddim_ddpm_pndm import clip_of, eps_form, threshold, x0_form
from sega_jax.method.schedules.spacing import Options, cumulative

_SIGMA_DATA = 0.5


def _timesteps(options: Options, steps: int) -> np.ndarray:
    if "timesteps" in options:
        return options["timesteps"]
    count, total = options["original_inference_steps"], options["num_train_timesteps"]
    if steps > count:
        raise ValueError(f"{steps} steps are more than original_inference_steps={count}; take fewer")
    distilled = np.arange(count, 0, -1) * (total // count) - 1
    return distilled[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)]


def lcm(options: Options, steps: int) -> Row:
    """Multi-step consistency sampling: every call goes to x0, and all but the last take fresh noise back up to the next
    timestep. The boundary condition mixes x0 with x by c_out and c_skip, which matter at the least timesteps alone."""
    bars, t = cumulative(options), _timesteps(options, steps)
    a, b = np.sqrt(bars[t]), np.sqrt(1 - bars[t])
    # No signal is lost and no noise added after the last call.
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
    """Trajectory consistency sampling, where eta says how far below the next timestep every call goes. It ends at
    timestep 0, whose noise stays; `clip_sample` and `thresholding` mean nothing, as in diffusers."""
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
        # Timesteps above the next one are not reached.
        sigma=np.where(np.arange(len(bars)) <= following[:, None], fresh, 0),
    )
    return table(t, row, shares=(a, b))
