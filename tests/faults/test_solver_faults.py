"""Faults in schedules and solvers, shown by tables, and by trajectories compared with diffusers' recorded ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import cases
from support import tiny

from faults.damage import argument, earlier, replaced, result, results, unchanged
from faults.views import Fault, View, Views, compiled, recorded
from sega_jax.method import schedules, solvers
from sega_jax.method.schedules import FAMILIES, ddim_ddpm_pndm, spacing

pytestmark = pytest.mark.fault

PATHS = {
    "ddim": ["ddim", "ddim_v", "ddim_eta_clip"],
    "pndm": ["pndm", "pndm_v"],
    "runge kutta": ["pndm_runge_kutta"],
    "ddpm": ["ddpm", "ddpm_large", "ddpm_threshold"],
    "euler": ["euler", "euler_v", "euler_ancestral"],
    "heun and lms": ["heun", "lms"],
    "dpm": ["dpm", "dpm_heun", "dpm_3", "dpm_stochastic"],
    "unipc": ["unipc", "unipc_3"],
}


def trajectory(name):
    """Returns every x of a trajectory for fixed network outputs and fixed noise."""
    config, steps, eta = cases.SCHEDULES[name]
    family = schedules.from_config(config)
    solver, table = solvers.SOLVERS[family.solver](eta), family.table(steps)

    def call(carry, inputs):
        row, output, fresh = inputs
        carry = solver.update(*carry, output, None, row, lambda _: fresh)
        return carry, carry[0]

    calls = len(table.call)
    inputs = table, cases.OUTPUTS[:calls], cases.NOISE[:calls]
    return jax.lax.scan(call, (jnp.asarray(cases.START), solver.init(cases.START)), inputs)[1]


def entered():
    """Returns parts of the tables for runs that start in the middle of a schedule.

    The parts are the indices of the calls, and the numbers of earlier outputs that multi-step solvers use in the first
    two calls.
    """
    calls = [schedules.from_config(config).table(10, 0.5).call for config in tiny.SCHEDULERS.values()]
    solvers_of_third_order = [
        schedules.from_config(tiny.SCHEDULERS[name] | {"solver_order": 3}, strict=False).table(10, 0.5).solver
        for name in ("DPM", "UniPC", "PNDM")
    ]
    return calls, [(one.x_from_memory[:2] != 0).sum(1) for one in solvers_of_third_order]


VIEWS = Views(
    {
        name: View(
            lambda names=names: compiled(lambda: [trajectory(name) for name in names]),
            lambda names=names: [recorded(f"schedule_{name}")["path"] for name in names],
            2e-5,
        )
        for name, names in PATHS.items()
    }
    | {"entered": View(entered)}
)


def options(**changes):
    """Changes options of the scheduler before the family computes its table."""
    return table(argument(0, lambda options: {**options, **changes}))


def table(damage):
    """Damages a family's table."""
    return lambda family: family._replace(table=damage(family.table))


def columns(**changes):
    """Changes columns of a family's table that the solver uses."""
    return table(result(lambda rows: rows._replace(solver=replaced(rows.solver, **changes))))


def without(*names):
    """Sets options to 0 before the call."""
    return argument(0, lambda options: {**options, **dict.fromkeys(names, 0)})


def noise_on_top(rows):
    """Does not reduce the predicted noise by the share of fresh noise, for an eta of 0.6."""
    return rows._replace(solver=rows.solver._replace(variance=rows.solver.variance + (0.6 * rows.solver.sigma) ** 2))


def equal_stages(t, begin, end, restart, weights, remember):
    """Gives equal weights to the four stages of the initial Runge-Kutta steps."""
    weights = weights.copy()
    weights[3:12:4, :4] = 1 / 4
    return t, begin, end, restart, weights, remember


def last_is_noisy(column):
    return np.append(column[:-1], 0.1)


FAULTS = {
    # Timesteps, betas and forms
    "the offset of the steps is ignored": Fault("ddim", spacing, "spaced", without("steps_offset")),
    "the network's output has the wrong sign in x0": Fault(
        "ddim", ddim_ddpm_pndm, "x0_form", results(lambda p, q: (p, -q))
    ),
    # Tables
    "DDIM adds fresh noise on top of the predicted noise": Fault(
        "ddim", FAMILIES, "DDIMScheduler", table(result(noise_on_top))
    ),
    "PNDM does not repeat its first step": Fault(
        "pndm", FAMILIES, "PNDMScheduler", columns(start_from_x=np.ones_like, start_from_start=np.zeros_like)
    ),
    "the Runge-Kutta start weights its stages equally": Fault(
        "runge kutta", ddim_ddpm_pndm, "_runge_kutta", results(equal_stages)
    ),
    "DDPM adds noise after timestep 0": Fault("ddpm", FAMILIES, "DDPMScheduler", columns(noise=last_is_noisy)),
    "the ancestral sampler adds the noise of the next call": Fault(
        "euler", FAMILIES, "EulerAncestralDiscreteScheduler", columns(noise=earlier)
    ),
    "Heun uses no second slope": Fault(
        "heun and lms",
        FAMILIES,
        "HeunDiscreteScheduler",
        columns(start_from_x=np.ones_like, start_from_start=np.zeros_like),
    ),
    "LMS is of third order": Fault(
        "heun and lms", FAMILIES, "LMSDiscreteScheduler", table(lambda lms: lambda *args: lms(*args, order=3))
    ),
    "DPM-Solver uses the midpoint method instead of Heun's": Fault(
        "dpm", FAMILIES, "DPMSolverMultistepScheduler", options(solver_type="midpoint")
    ),
    "UniPC skips the corrector": Fault(
        "unipc", FAMILIES, "UniPCMultistepScheduler", options(disable_corrector=range(99))
    ),
    # Updates
    "x0 is not clipped": Fault("ddim", solvers, "_bounded", unchanged()),
    "dynamic thresholding only clips": Fault(
        "ddpm",
        solvers,
        "_bounded",
        lambda bounded: lambda x, c: bounded(x, c) if c.threshold is None else jnp.clip(x, -1, 1),
    ),
    # Runs that start in the middle of a schedule
    "calls keep their numbers in a schedule that starts late": Fault(
        "entered", schedules, "_from", lambda start: lambda rows, call: jax.tree.map(lambda leaf: leaf[call:], rows)
    ),
    "the first call of a schedule that starts late expects earlier outputs": Fault(
        "entered", FAMILIES, "DPMSolverMultistepScheduler", options(begin=0)
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, monkeypatch):
    assert VIEWS.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults():
    assert VIEWS.wrong() == set()
