"""Schedules and solvers against trajectories of diffusers that `reference/record.py` recorded."""

import jax
import numpy as np
import pytest
from reference import cases
from support.recorded import recorded, relative

from sega_jax.method.schedules import from_config
from sega_jax.method.solvers import SOLVERS


@pytest.mark.parametrize("name", cases.SCHEDULES)
def test_schedules(name):
    """The timesteps, and every x of the trajectory to 2e-5; diffusers' coefficients are in float32."""
    config, steps, eta = cases.SCHEDULES[name]
    scheduler, wanted = from_config(config), recorded(f"schedule_{name}")
    table, solver = scheduler.table(steps), SOLVERS[scheduler.solver](eta)
    np.testing.assert_allclose(table.timestep, wanted["timesteps"], rtol=1e-5, atol=1e-4)
    update = jax.jit(lambda x, state, output, noise, row: solver.update(x, state, output, None, row, lambda _: noise))
    x, state = cases.START, solver.init(cases.START)
    for call, theirs in enumerate(wanted["path"]):
        row = jax.tree.map(lambda column, call=call: column[call], table)
        x, state = update(x, state, cases.OUTPUTS[call], cases.NOISE[call], row)
        assert relative(x, theirs) < 2e-5
