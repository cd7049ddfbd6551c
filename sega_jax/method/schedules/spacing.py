"""Betas, timesteps and sigmas from the options that diffusers' schedulers share, and custom lists of timesteps."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sega_jax.method.naming import assignment

# The options of a scheduler's config. `Scheduler.table` may add "timesteps", a descending array [calls] that replaces
# the number of steps, and "begin", the index of the first step that runs.
Options = Mapping[str, Any]


def cumulative(options: Options) -> np.ndarray:
    """Returns abar, the cumulative product of 1 - beta, for each training timestep.

    The result is float64, as in DeepFloyd-IF's own code; diffusers computes betas and products in float32.
    """
    count, kind = options["num_train_timesteps"], options["beta_schedule"]
    low, high = options["beta_start"], options["beta_end"]
    if options["trained_betas"] is not None:
        betas = np.asarray(options["trained_betas"], np.float64)
    elif kind == "linear":
        betas = np.linspace(low, high, count)
    elif kind == "scaled_linear":
        betas = np.linspace(math.sqrt(low), math.sqrt(high), count) ** 2
    else:
        # Nichol & Dhariwal 2021, eq. 17: abar is a squared cosine, and beta is at most 0.999.
        bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    bars = np.cumprod(1 - betas)
    if options.get("rescale_betas_zero_snr"):
        # Lin et al. 2024, algorithm 1: the last share of signal becomes 0, and the first stays unchanged.
        root = np.sqrt(bars)
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return bars


def sigmas_of(bars: np.ndarray) -> np.ndarray:
    """Returns sigma = noise / signal for each training timestep.

    Sigma is 0 before the first nonzero beta. abar = 0 is replaced with 2^-24, so that sigma is finite.
    """
    bars = np.where(bars > 0, bars, 2.0**-24)
    return np.sqrt((1 - bars) / bars)


def spaced(options: Options, steps: int, *, rounded: bool = True) -> np.ndarray:
    """Returns the descending timesteps for a spacing (Lin et al. 2024, table 2), rounded as in diffusers.

    A custom list of timesteps is returned unchanged.

    Args:
        rounded: Whether to round the timesteps of the spacing "linspace" to integers.

    Raises:
        ValueError: `steps_offset` moves a timestep beyond the last training timestep.
    """
    if "timesteps" in options:
        return options["timesteps"]
    total, spacing = options["num_train_timesteps"], options["timestep_spacing"]
    if spacing == "linspace":
        t = np.linspace(0, total - 1, steps)[::-1]
        t = t.round() if rounded else t
    elif spacing == "leading":
        t = np.arange(steps)[::-1] * (total // steps) + options["steps_offset"]
    else:
        t = _trailing(total, total, steps)
    return _inside(t, options, steps)


def spaced_before_end(options: Options, steps: int, total: int) -> np.ndarray:
    """Returns the descending timesteps for solvers whose spacing includes the endpoint.

    The function computes (steps + 1) timesteps and drops the last one. A custom list of timesteps is returned
    unchanged.

    Args:
        total: The number of training timesteps to use, starting at timestep 0.

    Raises:
        ValueError: `steps_offset` moves a timestep beyond the last training timestep.
    """
    if "timesteps" in options:
        return options["timesteps"]
    spacing = options["timestep_spacing"]
    if spacing == "linspace":
        t = np.linspace(0, total - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        t = (np.arange(steps + 1) * (total // (steps + 1)))[::-1][:-1] + options["steps_offset"]
    else:
        t = _trailing(total, options["num_train_timesteps"], steps)
    return _inside(t, options, steps)


def _trailing(first: int, total: int, steps: int) -> np.ndarray:
    # For some numbers of steps (61, 103, ...), diffusers' arange has an extra entry, the timestep -1.
    return np.round(np.arange(first, 0, -total / steps)[:steps]) - 1


def _inside(t: np.ndarray, options: Options, steps: int) -> np.ndarray:
    total = options["num_train_timesteps"]
    if t.max() >= total:
        raise ValueError(
            f"{steps} steps with steps_offset={options['steps_offset']} reach timestep {t.max():g}, but there are only"
            f" {total} training timesteps; use fewer steps"
        )
    return t.astype(np.float64)


def respaced(options: Options, ends: np.ndarray, steps: int) -> np.ndarray | None:
    """Returns descending sigmas between the first and last entry of `ends`, or None if no option respaces sigmas.

    The sigmas are spaced according to eq. 5 of Karras et al. 2022 with rho = 7, geometrically, or at the quantiles of a
    beta distribution (Lee et al. 2024).

    Raises:
        ValueError: An option respaces sigmas, but `options` also has a list of timesteps.
    """
    active = [key for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if options.get(key)]
    if active and "timesteps" in options:
        raise ValueError(f"{active[0]} determines the timesteps; give a number of steps, not timesteps")
    low, high = options.get("sigma_min"), options.get("sigma_max")
    if low is None:
        # If some betas are zero, use the least nonzero sigma: 0 has no logarithm, and the end would be reached twice.
        low = ends[ends > 0][-1] if ends.any() else 0.0
    high = ends[0] if high is None else high
    ramp = np.linspace(0, 1, steps)
    if options.get("use_karras_sigmas"):
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if options.get("use_exponential_sigmas"):
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    if options.get("use_beta_sigmas"):
        from scipy.stats import beta  # imported here because this import takes as long as importing JAX

        return low + beta.ppf(1 - ramp, 0.6, 0.6) * (high - low)
    return None


def timesteps_of(sigmas: np.ndarray, schedule: np.ndarray) -> np.ndarray:
    """Returns the fractional timesteps at which a training schedule has the given sigmas, by interpolating log(sigma)
    linearly."""
    logs = np.log(np.maximum(schedule, 1e-10))
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), logs, np.arange(len(logs)))


# DeepFloyd-IF's named lists of timesteps. The training timesteps are split into equal sections, starting at timestep 0.
# An entry is the number of timesteps to take from a section (Nichol & Dhariwal 2021, section 4; the notation is from
# their code).
NAMED = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20),
    "super27": (1, 1, 1, 1, 1, 1, 1, 2, 5, 13),
    "super40": (2, 2, 2, 2, 2, 2, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}


def given_timesteps(steps: Any, total: int) -> np.ndarray:
    """Checks a list of timesteps, or looks up a named list, and returns it as descending int64 [calls].

    Args:
        steps: Descending integers, or a key of `NAMED`.
        total: The number of training timesteps.

    Raises:
        TypeError: `steps` is neither a string nor a list of integers.
        ValueError: The name is unknown, the named list needs more training timesteps, the timesteps do not descend, or
            one of them is not between 0 and total - 1.
    """
    if isinstance(steps, str):
        if steps not in NAMED:
            raise ValueError(f"{assignment('steps', steps)} should be a whole number, or one of {', '.join(NAMED)}")
        array = _sections(NAMED[steps], total)
    else:
        try:
            array = np.asarray(steps)
        except (TypeError, ValueError, RuntimeError):  # ragged lists, and tensors whose data cannot be read on the host
            array = np.asarray(None)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise TypeError(
            f"{assignment('steps', steps)} should be a whole number, descending timesteps such as [999, 500, 0],"
            f" or one of {', '.join(NAMED)}"
        )
    if not 0 <= array.min() <= array.max() < total:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"steps has timestep {wrong}, but timesteps should be from 0 to {total - 1}")
    array = array.astype(np.int64)
    if (rises := np.flatnonzero(np.diff(array) >= 0)).size:
        before, after = array[rises[0] : rises[0] + 2]
        raise ValueError(f"steps has timestep {after} after {before}, but timesteps should descend without repeats")
    return array


def _sections(counts: tuple[int, ...], total: int) -> np.ndarray:
    """Returns descending timesteps from sections of equal length, one for each entry of `counts`.

    An entry is the number of timesteps to take from its section, evenly spaced from the section's first timestep to its
    last. If the sections cannot be equally long, the first ones are one timestep longer.
    """
    size, longer = divmod(total, len(counts))
    timesteps, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if length < count:
            raise ValueError(
                f"a section has only {length} of the {total} training timesteps, but the named list needs {count} of"
                " them; give a list of timesteps or a number of steps"
            )
        # Strides are summed as in the original code, because this affects how halves are rounded.
        strides = np.full(count - 1, (length - 1) / max(count - 1, 1))
        timesteps.append(start + np.cumsum([0.0, *strides]).round())
        start += length
    return np.concatenate(timesteps)[::-1].astype(int)
