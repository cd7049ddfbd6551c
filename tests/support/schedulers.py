"""Configs of schedulers with Stable Diffusion's betas, and combinations of options for DPM-Solver and UniPC."""

import numpy as np

from sega_jax.method.schedules import from_config
from support import tiny


def scheduler(name, **options):
    return from_config((tiny.SCHEDULERS | tiny.FURTHER)[name] | options)


def abar(config):
    root = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"])
    return np.cumprod(1 - root**2)


def dpm(order, kind="midpoint", algorithm="dpmsolver++"):
    return {"solver_order": order, "solver_type": kind, "algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}


def unipc(order, kind, data=True):
    return {"solver_order": order, "solver_type": kind, "predict_x0": data, "final_sigmas_type": "sigma_min"}
