"""Noise schedules as tables: one row per model call, computed on the host in float64.

A row holds what one call needs: the timestep for the network and the coefficients of the solver's
update. The compiled loop scans over the rows, so that another step count, spacing, prediction type or
set of betas is only other numbers.

A new family is a row type, a function from config and steps to its table, and an entry in `FAMILIES`;
its update goes into `sega_jax.solvers`.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class DDIMRow(NamedTuple):
    """Coefficients of one DDIM update (Song et al. 2021, eq. 12), abar the product of 1 - beta.

    The network's output becomes x0 and eps by two linear forms, which hold for every prediction type.
    """

    x0_from_x: Any
    x0_from_output: Any
    eps_from_x: Any
    eps_from_output: Any
    clip: Any  # bound of |x0|; infinite for none
    x0_scale: Any  # sqrt(abar_prev)
    variance: Any  # 1 - abar_prev, shared by eps and the fresh noise
    sigma: Any  # the fresh noise's standard deviation at eta = 1 (eq. 16)


class PLMSRow(NamedTuple):
    """Coefficients of one pseudo linear multi-step update (Liu et al. 2022, eqs. 9 and 12).

    The estimate is sum(weights * [output, *history]); the new x is from_x * x + from_estimate * estimate.
    """

    weights: Any  # [4], newest first
    from_x: Any
    from_estimate: Any
    again: Any  # bool: a second look at the previous step, from that step's x; leaves no history


class Row(NamedTuple):
    """One model call; in a table every field has a leading axis [calls]."""

    call: Any  # int32, 0-based; the noise of a call is drawn from it
    live: Any  # bool; rows that are not live fill a chunk up and are skipped
    timestep: Any  # float, in the units of the training's timesteps
    solver: Any  # DDIMRow or PLMSRow


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A checkpoint's scheduler: the name of its solver and its table for a number of steps."""

    name: str
    solver: str
    config: Mapping[str, Any]
    _table: Callable[[Mapping[str, Any], int], Row]

    def table(self, steps: int) -> Row:
        """A row per model call; PLMS makes one call more than steps.

        Raises:
            TypeError, ValueError: steps is not a whole number from 1 to the number that this
                configuration allows.
        """
        most = self.config["num_train_timesteps"]
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
            raise TypeError(f"steps={steps!r} should be a whole number")
        if not 1 <= steps <= most:
            raise ValueError(f"steps={steps} should be from 1 to {most}, the timesteps of the training")
        return self._table(self.config, int(steps))


def from_config(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler of a diffusers `scheduler_config.json`.

    Raises:
        ValueError: a scheduler, option or value that is not supported; the message lists what is.
    """
    name = config.get("_class_name")
    if name not in list(FAMILIES):
        raise ValueError(f"the scheduler {name!r} is not supported, only {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    known = {*family.defaults, *family.fixed}
    unknown = [k for k in config if not k.startswith("_") and k not in known | _FOREIGN]
    if unknown:
        raise ValueError(f"{name}: unknown options {', '.join(unknown)}; supported are {', '.join(sorted(known))}")
    for key, allowed in family.fixed.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{name}: {key}={config[key]!r} is not supported, only {allowed[0]!r}")
    options = {k: config.get(k, default) for k, default in family.defaults.items()}
    _check(name, options)
    return Scheduler(name, family.solver, options, family.table)


def _check(name: str, options: Mapping[str, Any]) -> None:
    for key, allowed in _CHOICES.items():
        if key in options and options[key] not in allowed:
            raise ValueError(f"{name}: {key}={options[key]!r} is not supported, only {', '.join(allowed)}")
    for key, default in _COMMON.items():
        value = options[key]
        if isinstance(default, bool):
            good = isinstance(value, bool)
        elif isinstance(default, int):
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        elif isinstance(default, float):
            good = isinstance(value, int | float) and 0 < value < 1
        else:
            continue
        if not good:
            raise ValueError(f"{name}: {key}={value!r} should be like {default!r}")
    if not isinstance(options.get("clip_sample", True), bool):
        raise ValueError(f"{name}: clip_sample={options['clip_sample']!r} should be like True")
    bound = options.get("clip_sample_range", 1.0)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
        raise ValueError(f"{name}: clip_sample_range={bound!r} should be like 1.0")
    if options["trained_betas"] is not None:
        betas = np.asarray(options["trained_betas"])
        numbered = betas.dtype.kind == "f" and betas.shape == (options["num_train_timesteps"],)
        if not numbered or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"{name}: trained_betas should be {options['num_train_timesteps']} numbers between 0 and 1"
                " (num_train_timesteps)"
            )
    if not 1 <= options["num_train_timesteps"] <= _MOST:
        raise ValueError(f"{name}: num_train_timesteps should be from 1 to {_MOST}")


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    count, kind = config["num_train_timesteps"], config["beta_schedule"]
    low, high = config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        return np.asarray(config["trained_betas"], np.float64)
    if kind == "linear":
        return np.linspace(low, high, count)
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(low), math.sqrt(high), count) ** 2
    # Nichol & Dhariwal 2021, eq. 17: a squared cosine, beta at most 0.999.
    bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


def _timesteps(config: Mapping[str, Any], steps: int) -> np.ndarray:
    """The timesteps in falling order (Lin et al. 2024, table 2), rounded as diffusers does."""
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps) + config["steps_offset"]
    # diffusers' arange has one entry too many for some numbers of steps (61, 103, ...), timestep -1.
    return np.round(np.arange(total, 0, -total / steps)[:steps]).astype(np.int64) - 1


def _cumulative(name: str, config: Mapping[str, Any], steps: int) -> Callable[[np.ndarray], np.ndarray]:
    """abar by timestep; before timestep 0 it is 1, or abar_0 without `set_alpha_to_one`."""
    bars = np.cumprod(1 - _betas(config))

    def look_up(t: np.ndarray) -> np.ndarray:
        if t.max() >= len(bars):
            raise ValueError(
                f"{name}: {steps} steps ask for timestep {t.max()} of {len(bars)} (steps_offset"
                f" {config['steps_offset']}); take fewer steps"
            )
        return np.where(t < 0, 1.0 if config["set_alpha_to_one"] else bars[0], bars[t])

    return look_up


def _rows(timesteps: np.ndarray, solver: NamedTuple) -> Row:
    count = len(timesteps)
    calls = np.arange(count, dtype=np.int32)
    return Row(calls, np.ones(count, bool), timesteps.astype(np.float64), solver)


def _ddim(config: Mapping[str, Any], steps: int) -> Row:
    look_up = _cumulative("DDIMScheduler", config, steps)
    t = _timesteps(config, steps)
    now, previous = look_up(t), look_up(t - config["num_train_timesteps"] // steps)
    a, b = np.sqrt(now), np.sqrt(1 - now)
    zero, one = np.zeros_like(a), np.ones_like(a)
    # Output o: eps gives x0 = (x - b o) / a; v = a eps - b x0 (Salimans & Ho 2022).
    forms = {
        "epsilon": (1 / a, -b / a, zero, one),
        "v_prediction": (a, -b, b, a),
    }[config["prediction_type"]]
    clip = config["clip_sample_range"] if config["clip_sample"] else math.inf
    sigma = np.sqrt((1 - previous) / (1 - now) * np.maximum(1 - now / previous, 0))
    return _rows(t, DDIMRow(*forms, np.full_like(a, clip), np.sqrt(previous), 1 - previous, sigma))


def _plms(config: Mapping[str, Any], steps: int) -> Row:
    look_up = _cumulative("PNDMScheduler", config, steps)
    stride = config["num_train_timesteps"] // steps
    t = _timesteps(config, steps)
    # The second timestep is called twice: the first step is taken anew with the mean of both ends.
    t = np.concatenate([t[:2], t[1:2], t[2:]])
    call = np.arange(len(t))
    again = call == 1
    now = look_up(np.where(again, t + stride, t))
    previous = look_up(np.where(again, t, t - stride))
    a, b = np.sqrt(now), np.sqrt(1 - now)
    # Eq. 9 moves along eps by `slope`; with v, eps = a v + b x.
    slope = -(previous - now) / (now * np.sqrt(1 - previous) + np.sqrt(now * (1 - now) * previous))
    if config["prediction_type"] == "epsilon":
        from_x, from_estimate = np.sqrt(previous / now), slope
    else:
        from_x, from_estimate = np.sqrt(previous / now) + slope * b, slope * a
    orders = np.array(
        [[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], np.array([23, -16, 5, 0]) / 12,
         np.array([55, -59, 37, -9]) / 24]
    )  # fmt: skip
    return _rows(t, PLMSRow(orders[np.minimum(call, 4)], from_x, from_estimate, again))


# Far beyond any training, and little memory.
_MOST = 100_000


class Family(NamedTuple):
    """A scheduler class of diffusers: its solver, table, options and the values some are fixed to."""

    solver: str
    table: Callable[[Mapping[str, Any], int], Row]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple]


_COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
}
_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
FAMILIES = {
    "DDIMScheduler": Family(
        solver="ddim",
        table=_ddim,
        defaults=_COMMON | {"clip_sample": True, "clip_sample_range": 1.0},
        fixed={"thresholding": (False,), "rescale_betas_zero_snr": (False,)},
    ),
    "PNDMScheduler": Family(
        solver="plms",
        table=_plms,
        defaults=_COMMON | {"set_alpha_to_one": False},
        # diffusers' default is False, the Runge-Kutta start, which its own pipelines cannot run.
        fixed={"skip_prk_steps": (True,)},
    ),
}
# Options of other diffusers schedulers: configs carry them from class to class, where they mean nothing.
_FOREIGN = {
    "algorithm_type", "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "euler_at_final",
    "final_sigmas_type", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "rescale_betas_zero_snr", "sample_max_value", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order",
    "solver_type", "thresholding", "timestep_type", "use_beta_sigmas", "use_exponential_sigmas",
    "use_karras_sigmas", "use_lu_lambdas", "variance_type",
}  # fmt: skip
