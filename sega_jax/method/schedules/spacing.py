"""Betas, timesteps and sigmas, from the options that diffusers' schedulers share, and timesteps given by hand or by the
name of a list."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sega_jax.method.checks import brief

# Of a scheduler's config; and "timesteps" [calls], falling, where they are given in place of a number of steps, and
# "begin", the first step that is run, where it is not the first of all.
Options = Mapping[str, Any]


def cumulative(options: Options) -> np.ndarray:
    """abar, the cumulative product of 1 - beta, by training timestep.

    In float64, as in DeepFloyd-IF's own code; diffusers has betas and products in float32.
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
        # Nichol & Dhariwal 2021, eq. 17: a squared cosine, beta at most 0.999.
        bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    bars = np.cumprod(1 - betas)
    if options.get("rescale_betas_zero_snr"):
        # Lin et al. 2024, algorithm 1: the last signal is shifted to 0, the first stays.
        root = np.sqrt(bars)
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return bars


def sigmas_of(bars: np.ndarray) -> np.ndarray:
    """Noise over signal by training timestep: 0 up to the first beta that is not; a vanished signal counts as 2^-24,
    so that sigma is finite."""
    bars = np.where(bars > 0, bars, 2.0**-24)
    return np.sqrt((1 - bars) / bars)


def spaced(options: Options, steps: int, *, whole: bool = True) -> np.ndarray:
    """The timesteps in falling order (Lin et al. 2024, table 2), rounded as diffusers does; or those given.

    Raises:
        ValueError: the offset leads beyond the training's timesteps.
    """
    if "timesteps" in options:
        return options["timesteps"]
    total, spacing = options["num_train_timesteps"], options["timestep_spacing"]
    if spacing == "linspace":
        t = np.linspace(0, total - 1, steps)[::-1]
        t = t.round() if whole else t
    elif spacing == "leading":
        t = np.arange(steps)[::-1] * (total // steps) + options["steps_offset"]
    else:
        t = _trailing(total, total, steps)
    return _inside(t, options, steps)


def spaced_before_end(options: Options, steps: int, total: int) -> np.ndarray:
    """Spaces timesteps for solvers that count the end among the points: makes one more of them and leaves the last out.

    Only the first `total` timesteps are used. Given timesteps are used as they are."""
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
    # diffusers' arange has one entry too many for some numbers of steps (61, 103, ...), timestep -1.
    return np.round(np.arange(first, 0, -total / steps)[:steps]) - 1


def _inside(t: np.ndarray, options: Options, steps: int) -> np.ndarray:
    total = options["num_train_timesteps"]
    if t.max() >= total:
        raise ValueError(
            f"{steps} steps ask for timestep {t.max():g} of {total} (steps_offset {options['steps_offset']});"
            " take fewer steps"
        )
    return t.astype(np.float64)


def respaced(options: Options, ends: np.ndarray, steps: int) -> np.ndarray | None:
    """Falling sigmas, spaced as an option asks between the first and the last of `ends`; None where none does.

    Karras et al. 2022, eq. 5, with rho = 7; geometric; or quantiles of a beta distribution (Lee et al. 2024).
    """
    asked = [key for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if options.get(key)]
    if asked and "timesteps" in options:
        raise ValueError(f"{asked[0]} spaces the steps itself; give a number of steps, not timesteps")
    low, high = options.get("sigma_min"), options.get("sigma_max")
    if low is None:
        # Where betas are zero, the least sigma that is not: 0 has no logarithm, and would be reached twice.
        low = ends[ends > 0][-1] if ends.any() else 0.0
    high = ends[0] if high is None else high
    ramp = np.linspace(0, 1, steps)
    if options.get("use_karras_sigmas"):
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if options.get("use_exponential_sigmas"):
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    if options.get("use_beta_sigmas"):
        from scipy.stats import beta  # as long to import as all of JAX

        return low + beta.ppf(1 - ramp, 0.6, 0.6) * (high - low)
    return None


def timesteps_of(sigmas: np.ndarray, schedule: np.ndarray) -> np.ndarray:
    """Where sigmas lie among the training's, by linear interpolation of their logarithms."""
    logs = np.log(np.maximum(schedule, 1e-10))
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), logs, np.arange(len(logs)))


# How many timesteps each of the equal sections of the training keeps, from timestep 0 on (Nichol & Dhariwal
# 2021, section 4, as their code writes it): the respacings of DeepFloyd-IF.
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
    """The falling timesteps [calls] that `steps` is or names, of `total` of the training; int64.

    Raises:
        TypeError: it is no list of whole numbers.
        ValueError: an unknown name, or one of more timesteps than there are; or timesteps that do not fall or
            are not from 0 to total - 1.
    """
    if isinstance(steps, str):
        if steps not in NAMED:
            raise ValueError(f"steps={brief(steps)} should be a whole number, or one of {', '.join(NAMED)}")
        array = _sections(NAMED[steps], total)
    else:
        try:
            array = np.asarray(steps)
        except (TypeError, ValueError, RuntimeError):  # ragged lists, and what has no values on the host
            array = np.asarray(None)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise TypeError(
            f"steps={brief(steps)} should be a whole number, falling timesteps like [999, 500, 0],"
            f" or one of {', '.join(NAMED)}"
        )
    if not 0 <= array.min() <= array.max() < total:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"steps has timestep {wrong}; all should be from 0 to {total - 1}, those of the training")
    array = array.astype(np.int64)
    if (rises := np.flatnonzero(np.diff(array) >= 0)).size:
        before, after = array[rises[0] : rises[0] + 2]
        raise ValueError(f"steps has timestep {after} after {before}; give falling ones, each once")
    return array


def _sections(counts: tuple[int, ...], total: int) -> np.ndarray:
    """Each section from its first timestep to its last; a remainder makes the first sections longer by one."""
    size, longer = divmod(total, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if length < count:
            raise ValueError(f"of {total} timesteps, {length} cannot be {count}; give the timesteps, or their number")
        # Summed up, which decides how halves are rounded.
        strides = np.full(count - 1, (length - 1) / max(count - 1, 1))
        kept.append(start + np.cumsum([0.0, *strides]).round())
        start += length
    return np.concatenate(kept)[::-1].astype(int)
