"""Compares schedules and solvers with trajectories from diffusers, recorded by `reference/record.py`."""

import jax
import numpy as np
import pytest
from reference import cases
from support.recorded import recorded, relative

from sega_jax.method.schedules import from_config
from sega_jax.method.solvers import SOLVERS


@pytest.mark.parametrize("name", cases.SCHEDULES)
def test_trajectories(name):
    """Every x in the trajectory agrees to within 2e-5; diffusers computes its coefficients only in float32."""
    config, steps, eta = cases.SCHEDULES[name]
    scheduler, reference = from_config(config), recorded(f"schedule_{name}")
    table, solver = scheduler.table(steps), SOLVERS[scheduler.solver](eta)
    np.testing.assert_allclose(table.timestep, reference["timesteps"], rtol=1e-5, atol=1e-4)
    update = jax.jit(lambda x, state, output, noise, row: solver.update(x, state, output, None, row, lambda _: noise))
    x, state = cases.START, solver.init(cases.START)
    for call, expected in enumerate(reference["path"]):
        row = jax.tree.map(lambda column, call=call: column[call], table)
        x, state = update(x, state, cases.OUTPUTS[call], cases.NOISE[call], row)
        assert relative(x, expected) < 2e-5
