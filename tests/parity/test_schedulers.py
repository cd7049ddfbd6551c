"""DDIM and PNDM against diffusers' schedulers: timesteps, and whole trajectories in float64 over given outputs."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from functools import partial

import jax
import numpy as np
import torch

from parity.theirs import double, noise, relative, scheduler
from sega_jax.schedules import from_config
from sega_jax.solvers import SOLVERS

pytestmark = pytest.mark.parity

# Relative L2 of every state of a trajectory.
TRAJECTORY = 1e-9
STEPS = (1, 2, 3, 4, 7, 10, 49, 50)
SHAPE = (2, 4)

DDIM = {"_class_name": "DDIMScheduler"}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = ("leading", "trailing", "linspace")


@partial(jax.jit, static_argnames="solver")
def update(solver, eta, x, state, output, row, drawn):
    return SOLVERS[solver](eta).update(x, state, output, None, row, lambda shape: drawn)


def ours(config, steps, x, outputs, eta, drawn):
    made = from_config(config)
    table = made.table(steps)
    state, trajectory = SOLVERS[made.solver](eta).init(x), []
    for i in range(len(table.call)):
        row = jax.tree.map(lambda column, i=i: column[i], table)
        x, state = update(made.solver, eta, x, state, outputs[i], row, drawn[i])
        trajectory.append(x)
    return table.timestep, trajectory


def theirs(config, steps, x, outputs, eta, drawn):
    made = scheduler(config)
    made.set_timesteps(steps)
    x, trajectory = torch.tensor(x), []
    for i, t in enumerate(made.timesteps):
        extra = (
            {"eta": eta, "variance_noise": torch.tensor(drawn[i])} if config["_class_name"] == "DDIMScheduler" else {}
        )
        x = made.step(torch.tensor(outputs[i]), t, x, **extra).prev_sample
        trajectory.append(x)
    return made.timesteps, trajectory


def compare(config, steps=STEPS, eta=0.0):
    with double():
        for count in steps:
            x, outputs, drawn = noise(*SHAPE), noise(count + 1, *SHAPE, seed=1), noise(count + 1, *SHAPE, seed=2)
            t, expected = theirs(config, count, x, outputs, eta, drawn)
            timestep, trajectory = ours(config, count, x, outputs, eta, drawn)
            assert timestep.tolist() == t.tolist()
            assert max(relative(*both) for both in zip(trajectory, expected, strict=True)) < TRAJECTORY


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("config", [DDIM, PNDM], ids=["DDIM", "PNDM"])
def test_timesteps_of_any_number(config, spacing, offset):
    """Equal, but that diffusers adds a timestep -1 to some numbers of trailing steps, 61 among them."""
    config = config | {"timestep_spacing": spacing, "steps_offset": offset}
    expected = scheduler(config)
    for steps in range(1, 1000):
        expected.set_timesteps(steps)
        assert from_config(config).table(steps).timestep.tolist() == [t for t in expected.timesteps.tolist() if t >= 0]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim(spacing, offset, one, prediction, clip, eta):
    options = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": one}
    compare(DDIM | SD | options | {"prediction_type": prediction, "clip_sample": clip}, eta=eta)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pndm(spacing, offset, one, prediction):
    options = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": one}
    compare(PNDM | SD | options | {"prediction_type": prediction})


@pytest.mark.parametrize(
    "betas",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.03},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.random.default_rng(0).uniform(1e-4, 0.02, 1000).tolist()},
        {"num_train_timesteps": 100},
        {"num_train_timesteps": 130, "beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=["default", "linear", "scaled_linear", "squaredcos_cap_v2", "trained", "100", "cosine of 130"],
)
@pytest.mark.parametrize("config", [DDIM, DDIM | {"clip_sample_range": 0.5}, PNDM], ids=["DDIM", "clipped", "PNDM"])
def test_betas(config, betas):
    compare(config | betas, eta=0.3)


@pytest.mark.parametrize("config", [DDIM, PNDM], ids=["DDIM", "PNDM"])
def test_all_steps_of_the_training(config):
    compare(config | SD, steps=[1000])
