"""The supported schedulers, keyed by diffusers class name, with their options, supported values and tables."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sega_jax.method.checks import did_you_mean
from sega_jax.method.schedules import consistency, ddim_ddpm_pndm, edm, exponential, sigmas
from sega_jax.method.schedules.calls import Row
from sega_jax.method.schedules.spacing import Options


class Family(NamedTuple):
    """A scheduler class of diffusers 0.42.1."""

    table: Callable[[Options, int], Row]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = {}  # options with only one supported value
    choices: Mapping[str, tuple[str, ...]] = {}  # {option: supported values}, in addition to `_CHOICES`
    aliases: Mapping[str, Mapping[str, str]] = {}  # {option: {another class's value: its replacement}}
    solver: Callable[[Options], str] = lambda options: "multistep"
    order: int | None = 1  # model calls per step; None if the table itself omits the steps that do not run
    eta: float | None = None  # the default eta, the share of fresh noise; None if the solver has no eta
    training: str = "betas"  # how networks must be trained, a key of `TRAININGS`


# The kinds of training that schedulers assume. A network that was trained differently would produce noise.
TRAININGS = {
    "betas": "networks trained with noise from betas at integer timesteps",
    "edm": "networks trained with EDM's preconditioning (sigma_data)",
    "ipndm": "networks trained with times from 0 to 1",
}

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_RESPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_ALPHAS = _BETAS | {"timestep_spacing": "leading"}
_SIGMAS = _BETAS | {"timestep_spacing": "linspace"}
_ENDS = {"sigma_min": None, "sigma_max": None}
_MULTISTEP = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_FLOWS = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
_DPM_ALIASES = {
    "solver_type": {"bh1": "midpoint", "bh2": "midpoint", "logrho": "midpoint"},
    "algorithm_type": {"deis": "dpmsolver++"},
}
_EDM = {
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
_EDM_PREDICTIONS = {"prediction_type": ("epsilon", "v_prediction")}

FAMILIES = {
    "DDIMScheduler": Family(
        ddim_ddpm_pndm.ddim,
        _ALPHAS | _CLIP | _THRESHOLD | _ZERO_SNR | {"set_alpha_to_one": True},
        solver=lambda options: "ddim",
        eta=0.0,
    ),
    "PNDMScheduler": Family(
        ddim_ddpm_pndm.pndm,
        _ALPHAS | {"skip_prk_steps": False, "set_alpha_to_one": False},
        solver=lambda options: "multistep" if options["skip_prk_steps"] else "runge_kutta",
        order=None,
    ),
    "DDPMScheduler": Family(
        ddim_ddpm_pndm.ddpm,
        _ALPHAS | _CLIP | _THRESHOLD | _ZERO_SNR | {"variance_type": "fixed_small"},
        choices={"variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")},
    ),
    "EulerDiscreteScheduler": Family(
        sigmas.euler,
        _SIGMAS
        | _RESPACED
        | _ENDS
        | _ZERO_SNR
        | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    ),
    "EulerAncestralDiscreteScheduler": Family(sigmas.euler_ancestral, _SIGMAS | _ZERO_SNR),
    "HeunDiscreteScheduler": Family(
        sigmas.heun,
        _SIGMAS | _RESPACED | _SD_BETAS | {"clip_sample": False, "clip_sample_range": 1.0},
        order=2,
    ),
    "KDPM2DiscreteScheduler": Family(sigmas.kdpm2, _SIGMAS | _RESPACED | _SD_BETAS, order=2),
    "KDPM2AncestralDiscreteScheduler": Family(sigmas.kdpm2_ancestral, _SIGMAS | _RESPACED | _SD_BETAS, order=2),
    "LMSDiscreteScheduler": Family(sigmas.lms, _SIGMAS | _RESPACED),
    "DPMSolverMultistepScheduler": Family(
        exponential.dpm_solver,
        _SIGMAS
        | _RESPACED
        | _MULTISTEP
        | _THRESHOLD
        | _ZERO_SNR
        | {
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "euler_at_final": False,
            "lambda_min_clipped": -math.inf,
        },
        _FLOWS | {"use_lu_lambdas": False},
        {"solver_type": ("midpoint", "heun")},
        _DPM_ALIASES,
    ),
    "DPMSolverSinglestepScheduler": Family(
        exponential.dpm_singlestep,
        {key: value for key, value in _BETAS.items() if key != "steps_offset"}
        | _RESPACED
        | _MULTISTEP
        | _THRESHOLD
        | {
            "lower_order_final": False,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "lambda_min_clipped": -math.inf,
        },
        _FLOWS,
        {"solver_type": ("midpoint", "heun"), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")},
        _DPM_ALIASES,
    ),
    "DEISMultistepScheduler": Family(
        exponential.deis,
        _SIGMAS
        | _RESPACED
        | _THRESHOLD
        | {"solver_order": 2, "lower_order_final": True, "algorithm_type": "deis", "solver_type": "logrho"},
        _FLOWS,
        {"solver_type": ("logrho",), "algorithm_type": ("deis",)},
        {
            "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
            "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
        },
    ),
    "UniPCMultistepScheduler": Family(
        exponential.unipc,
        _SIGMAS
        | _RESPACED
        | _ENDS
        | _MULTISTEP
        | _THRESHOLD
        | _ZERO_SNR
        | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": ()},
        _FLOWS | {"solver_p": None, "shift_terminal": None},
        {"solver_type": ("bh1", "bh2")},
        {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
    ),
    "LCMScheduler": Family(consistency.lcm, _ALPHAS | _CLIP | _THRESHOLD | _ZERO_SNR | _SD_BETAS | _DISTILLED),
    "TCDScheduler": Family(
        consistency.tcd,
        _ALPHAS | _CLIP | _THRESHOLD | _ZERO_SNR | _SD_BETAS | _DISTILLED,
        solver=lambda options: "tcd",
        eta=0.3,
    ),
    "EDMEulerScheduler": Family(edm.euler, _EDM, choices=_EDM_PREDICTIONS, training="edm"),
    "EDMDPMSolverMultistepScheduler": Family(
        edm.dpm_solver,
        _EDM
        | _MULTISTEP
        | _THRESHOLD
        | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False},
        choices=_EDM_PREDICTIONS
        | {"solver_type": ("midpoint", "heun"), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
        aliases=_DPM_ALIASES,
        training="edm",
    ),
    "IPNDMScheduler": Family(
        ddim_ddpm_pndm.ipndm, {"num_train_timesteps": 1000}, {"trained_betas": None}, training="ipndm"
    ),
}

_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "sigma_schedule": ("karras", "exponential"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
}
_NUMBERS = {
    "num_train_timesteps": (int, lambda v: 1 <= v <= 100_000, "a whole number from 1 to 100000"),
    "steps_offset": (int, lambda v: v >= 0, "a whole number of at least 0"),
    "solver_order": (int, lambda v: 1 <= v <= 3, "1, 2 or 3"),
    "original_inference_steps": (int, lambda v: v >= 1, "a whole number of at least 1"),
    "beta_start": (int | float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1"),
    "beta_end": (int | float, lambda v: 0 < v < 1, "a number between 0 and 1"),
    "clip_sample_range": (int | float, lambda v: 0 < v < math.inf, "a positive number"),
    "dynamic_thresholding_ratio": (int | float, lambda v: 0 <= v <= 1, "a number in [0, 1]"),
    "sample_max_value": (int | float, lambda v: 1 <= v < math.inf, "a number of at least 1"),
    "sigma_min": (int | float, lambda v: 0 < v < math.inf, "a positive number"),
    "sigma_max": (int | float, lambda v: 0 < v < math.inf, "a positive number"),
    "sigma_data": (int | float, lambda v: 0 < v < math.inf, "a positive number"),
    "rho": (int | float, lambda v: 0 < v < math.inf, "a positive number"),
    "timestep_scaling": (int | float, lambda v: 0 < v < math.inf, "a positive number"),
    "lambda_min_clipped": (int | float, lambda v: v < 0, "a negative number, the minimum of log(signal / noise)"),
}
# Options that any config may have, because diffusers' schedulers can be created from each other's configs.
_FOREIGN = {
    "flow_shift", "time_shift_type", "prk_timesteps",
    *(key for family in FAMILIES.values() for key in (*family.defaults, *family.fixed)),
}  # fmt: skip
# Options that make torch schedulers reproduce diffusers' former Flax schedulers. In their first versions, DDIM never
# clipped, DPM-Solver ended at timestep 0, and Euler counted "leading" timesteps from 1.
_FLAX_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {"final_sigmas_type": "sigma_min"},
    "EulerDiscreteScheduler": {"steps_offset": 1},
}


def of_torch(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of the equivalent torch scheduler. A torch config is returned unchanged."""
    flax = config.get("_class_name")
    if not isinstance(flax, str) or not flax.startswith("Flax"):
        return dict(config)
    name = flax.removeprefix("Flax")
    explicit = {key: value for key, value in config.items() if value is not None}
    return {**config, **_FLAX_DEFAULTS.get(name, {}), **explicit, "_class_name": name}


def plain(name: str) -> str:
    """Returns the essential letters of a scheduler's name, so that "DPM++" resembles DPMSolverMultistepScheduler."""
    name = name.lower().replace("dpmpp", "dpm++").replace("dpm++", "dpmsolver")
    name = name.replace("scheduler", "").replace("discrete", "")
    return "".join(letter for letter in name if letter.isalnum())


def resolve(config: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """Returns all options of a config's scheduler class. Options that are missing or null get their default values.

    Args:
        strict: Whether to reject an option that no supported scheduler has, instead of ignoring it.

    Raises:
        ValueError: The scheduler, an option or a value is not supported. The message lists the supported names or
            values.
    """
    name = config.get("_class_name")
    if name not in list(FAMILIES):
        hint = did_you_mean(name, FAMILIES, plain)
        raise ValueError(f"the scheduler {name!r} is not supported; supported schedulers: {', '.join(FAMILIES)}{hint}")
    family = FAMILIES[name]
    known = {*family.defaults, *family.fixed}
    unknown = [k for k in config if not k.startswith("_") and k not in known | _FOREIGN]
    if unknown and strict:
        raise ValueError(
            f"{name}: unknown options {', '.join(unknown)}; the supported options are {', '.join(sorted(known))}"
        )
    for key, only in family.fixed.items():
        if config.get(key, only) not in (only, None):
            raise ValueError(f"{name}: {key}={config[key]!r} is not supported; supported values: {only!r}")
    options = dict(family.defaults)
    accepted = [*options, *(_ENDS if _RESPACED.keys() & family.defaults.keys() else ())]
    # As in diffusers, classes that respace sigmas accept `sigma_min` and `sigma_max` from a different class's config.
    options |= {key: config[key] for key in accepted if config.get(key) is not None}
    for key, other in family.aliases.items():
        if isinstance(options[key], str):
            options[key] = other.get(options[key], options[key])
    try:
        for key, value in options.items():
            _check(key, value, family)
        _check_together(options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return options


def _check(key: str, value: Any, family: Family) -> None:
    choices = {**_CHOICES, **family.choices}
    if key in choices:
        if value not in choices[key]:
            raise ValueError(f"{key}={value!r} is not supported; supported values: {', '.join(choices[key])}")
    elif key in _NUMBERS:
        kind, is_valid, noun = _NUMBERS[key]
        default = family.defaults.get(key)
        if value == default and type(value) is type(default):
            return
        if isinstance(value, bool) or not isinstance(value, kind) or not is_valid(value):
            raise ValueError(f"{key}={value!r} should be {noun}")
    elif isinstance(family.defaults[key], bool) and not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} should be true or false")
    elif key == "disable_corrector":
        calls = value if isinstance(value, list | tuple) else [None]
        if not all(isinstance(call, int) and not isinstance(call, bool) and call >= 0 for call in calls):
            raise ValueError(f"{key}={value!r} should be a list of call numbers, such as [0, 1]")


def _check_together(options: Options) -> None:
    betas = options.get("trained_betas")
    if betas is not None:
        array = np.asarray(betas) if isinstance(betas, list | tuple | np.ndarray) else np.asarray(None)
        fits = array.dtype.kind == "f" and array.shape == (options["num_train_timesteps"],)
        if not fits or not ((array >= 0) & (array < 1)).all() or not array.any():
            raise ValueError(
                f"trained_betas should have {options['num_train_timesteps']} numbers (num_train_timesteps) of at least"
                " 0 and below 1, not all of them 0"
            )
    count, total = options.get("original_inference_steps", 1), options["num_train_timesteps"]
    if count > total:
        raise ValueError(f"original_inference_steps={count} should be at most num_train_timesteps={total}")
    spacings = [key for key in _RESPACED if options.get(key)]
    if len(spacings) > 1:
        raise ValueError(f"{' and '.join(spacings)} cannot be combined; use only one of them")
    low, high = options.get("sigma_min"), options.get("sigma_max")
    if low is not None and high is not None and low >= high:
        raise ValueError(f"sigma_min={low} should be below sigma_max={high}")
    kind = options.get("algorithm_type", "")
    if kind in ("dpmsolver", "sde-dpmsolver") and options["final_sigmas_type"] == "zero":
        raise ValueError(f"algorithm_type={kind!r} cannot end at zero noise; use final_sigmas_type='sigma_min'")
    if "predict_x0" in options and options["final_sigmas_type"] == "zero":
        if not options["predict_x0"]:
            raise ValueError("predict_x0=False cannot end at zero noise; use final_sigmas_type='sigma_min'")
        if options["solver_order"] > 1 and not options["lower_order_final"]:
            raise ValueError("only a last step of order 1 can end at zero noise; use lower_order_final=True")
    if options.get("thresholding"):
        if kind in ("dpmsolver", "sde-dpmsolver"):
            raise ValueError(f"algorithm_type={kind!r} predicts noise, but thresholding needs x0; use '{kind}++'")
        if kind == "deis":
            raise ValueError(
                "this scheduler predicts noise, but thresholding needs x0; use DPMSolverMultistepScheduler"
            )
        if not options.get("predict_x0", True):
            raise ValueError("predict_x0=False predicts noise, but thresholding needs x0; use predict_x0=True")
    if kind.startswith("sde") and options["solver_order"] == 3 and "euler_at_final" in options:
        raise ValueError(f"algorithm_type={kind!r} supports solver_order 1 and 2, not 3")
