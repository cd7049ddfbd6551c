"""Faults in schedules and solvers, shown by the trajectories that diffusers' schedulers took and by the tables."""

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
    """Returns every x of a trajectory along given outputs and given noise."""
    config, steps, eta = cases.SCHEDULES[name]
    family = schedules.from_config(config)
    solver, table = solvers.SOLVERS[family.solver](eta), family.table(steps)

    def call(carry, given):
        row, output, fresh = given
        carry = solver.update(*carry, output, None, row, lambda _: fresh)
        return carry, carry[0]

    calls = len(table.call)
    given = table, cases.OUTPUTS[:calls], cases.NOISE[:calls]
    return jax.lax.scan(call, (jnp.asarray(cases.START), solver.init(cases.START)), given)[1]


def entered():
    """Returns what tables hold that are entered in their middle: the numbers of the calls, and how many remembered
    outputs the first two calls of multi-step solvers use."""
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
    """Changes options of the scheduler before the family makes its table."""
    return table(argument(0, lambda given: {**given, **changes}))


def table(damage):
    """Damages a family's table."""
    return lambda family: family._replace(table=damage(family.table))


def columns(**changes):
    """Changes columns of a family's table that its solver reads."""
    return table(result(lambda rows: rows._replace(solver=replaced(rows.solver, **changes))))


def without(*names):
    """Clears options before the call."""
    return argument(0, lambda options: {**options, **dict.fromkeys(names, 0)})


def noise_on_top(rows):
    """Leaves the share of the predicted noise as large as it is without fresh noise, for an eta of 0.6."""
    return rows._replace(solver=rows.solver._replace(variance=rows.solver.variance + (0.6 * rows.solver.sigma) ** 2))


def equal_stages(t, begin, end, anew, weights, remember):
    """Gives the four stages of the Runge-Kutta start equal weights."""
    weights = weights.copy()
    weights[3:12:4, :4] = 1 / 4
    return t, begin, end, anew, weights, remember


def last_is_noisy(column):
    return np.append(column[:-1], 0.1)


FAULTS = {
    # Timesteps, betas and forms
    "the offset of the steps is ignored": Fault("ddim", spacing, "spaced", without("steps_offset")),
    "the output has the wrong sign in x0": Fault("ddim", ddim_ddpm_pndm, "x0_form", results(lambda p, q: (p, -q))),
    # Tables
    "DDIM adds fresh noise on top of the predicted noise": Fault(
        "ddim", FAMILIES, "DDIMScheduler", table(result(noise_on_top))
    ),
    "PNDM does not take its first step again": Fault(
        "pndm", FAMILIES, "PNDMScheduler", columns(start_from_x=np.ones_like, start_from_start=np.zeros_like)
    ),
    "the Runge-Kutta start weighs its stages alike": Fault(
        "runge kutta", ddim_ddpm_pndm, "_runge_kutta", results(equal_stages)
    ),
    "DDPM adds noise after timestep 0": Fault("ddpm", FAMILIES, "DDPMScheduler", columns(noise=last_is_noisy)),
    "the ancestral sampler adds the noise of the next call": Fault(
        "euler", FAMILIES, "EulerAncestralDiscreteScheduler", columns(noise=earlier)
    ),
    "Heun takes no second slope": Fault(
        "heun and lms",
        FAMILIES,
        "HeunDiscreteScheduler",
        columns(start_from_x=np.ones_like, start_from_start=np.zeros_like),
    ),
    "LMS is of third order": Fault(
        "heun and lms", FAMILIES, "LMSDiscreteScheduler", table(lambda lms: lambda *args: lms(*args, order=3))
    ),
    "DPM-Solver takes the midpoint for Heun's slope": Fault(
        "dpm", FAMILIES, "DPMSolverMultistepScheduler", options(solver_type="midpoint")
    ),
    "UniPC does not correct": Fault("unipc", FAMILIES, "UniPCMultistepScheduler", options(disable_corrector=range(99))),
    # Updates
    "x0 is not clipped": Fault("ddim", solvers, "_bounded", unchanged()),
    "dynamic thresholding cuts and does not scale": Fault(
        "ddpm",
        solvers,
        "_bounded",
        lambda bounded: lambda x, c: bounded(x, c) if c.threshold is None else jnp.clip(x, -1, 1),
    ),
    # Schedules that are entered late
    "calls keep their numbers where a schedule is entered late": Fault(
        "entered", schedules, "_from", lambda start: lambda rows, call: jax.tree.map(lambda leaf: leaf[call:], rows)
    ),
    "the first call of a late entry counts on earlier outputs": Fault(
        "entered", FAMILIES, "DPMSolverMultistepScheduler", options(begin=0)
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name, monkeypatch):
    assert VIEWS.sees(FAULTS[name], monkeypatch)


def test_without_a_fault_nothing_is_seen():
    assert VIEWS.wrong() == set()
