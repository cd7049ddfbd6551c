"""Schedulers that `tiny.SCHEDULERS` omits, and zero betas in all schedulers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from sega_jax.method.schedules import from_config
from sega_jax.method.solvers import SOLVERS

REST = tiny.FURTHER | tiny.WITHOUT_BETAS
TWICE = ("KDPM2", "KDPM2 ancestral")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEADING_ZEROS = {"trained_betas": [0.0] * 150 + np.linspace(1e-3, 0.02, 850).tolist()}
ZEROS_BETWEEN = {"trained_betas": [*np.linspace(1e-4, 0.01, 400), *[0.0] * 250, *np.linspace(0.01, 0.02, 350)]}
SDE = {"algorithm_type": "sde-dpmsolver++"}


def table_of(name, steps, strength=1.0, **options):
    return from_config((tiny.SCHEDULERS | REST)[name] | options, strict=False).table(steps, strength)


@pytest.mark.parametrize("steps", [2, 5, 50])
@pytest.mark.parametrize("name", REST)
def test_tables_descend_and_start_without_memory(name, steps):
    full, late = table_of(name, steps), table_of(name, steps, 0.5)
    calls = [2 * count - 1 if name in TWICE else count for count in (steps, steps // 2)]
    assert [len(table.call) for table in (full, late)] == calls
    for table in (full, late):
        assert all(len(leaf) == len(table.call) for leaf in jax.tree.leaves(table))
        assert (np.diff(table.noise / np.maximum(table.signal, 1e-3)) < 1e-9).all()
        assert (np.diff(table.timestep) < 1e-9).all()
    if name != "TCD":
        assert not late.solver.x_from_memory[0, 1:].any()
        assert not late.solver.start_from_start[0]
    assert late.timestep.tolist() == full.timestep[-len(late.call) :].tolist()


@pytest.mark.parametrize("name", [name for name in REST if name != "TCD"])
def test_multistep_tables_have_the_same_form(name):
    """Replacing one scheduler with another therefore needs no recompilation."""

    def form(table):
        return jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), table)

    assert form(table_of(name, 4)) == form(table_of("Euler", 4))
    assert from_config(REST[name]).solver == "multistep"


@pytest.mark.parametrize("name", ["KDPM2", "KDPM2 ancestral", "DPM, single-step", "DEIS", "LCM", "TCD"])
def test_custom_timesteps(name):
    spacing = {} if name in ("LCM", "TCD") else {"timestep_spacing": "linspace"}
    by_number = table_of(name, 4, **spacing)
    timesteps = by_number.timestep[:: 2 if name in TWICE else 1].astype(int).tolist()
    assert len(timesteps) == 4
    by_list = table_of(name, timesteps, **spacing)
    if name not in ("DPM, single-step", "DEIS"):
        # KDPM2's spaced timesteps are fractional, but the list contains integers.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2), by_list, by_number)
    assert by_list.timestep[0] == timesteps[0]


@pytest.mark.parametrize(
    ("name", "steps", "options", "message"),
    [
        ("LCM", 51, {}, "steps=51 should be at most original_inference_steps=50; use fewer"),
        ("TCD", 51, {}, "steps=51 should be at most original_inference_steps=50; use fewer"),
        ("LCM", 4, {"num_train_timesteps": 40}, "original_inference_steps=50 should be at most num_train_timesteps=40"),
        (
            "LCM",
            4,
            {"original_inference_steps": 0},
            "original_inference_steps=0 should be a whole number of at least 1",
        ),
        ("TCD", 4, {"timestep_scaling": 0}, "timestep_scaling=0 should be a positive number"),
        ("LCM", 4, {"rescale_betas_zero_snr": True}, "has no signal, so x0 cannot be computed from epsilon"),
        ("DEIS", 4, {"thresholding": True}, "this scheduler predicts noise, but thresholding needs x0"),
        ("DEIS", 4, SDE, "algorithm_type='sde-dpmsolver[+][+]' is not supported; supported values: deis"),
        ("DEIS", 4, {"use_flow_sigmas": True}, "use_flow_sigmas=True is not supported; supported values: False"),
        ("DEIS", 4, {"solver_order": 4}, "solver_order=4 should be 1, 2 or 3"),
        (
            "DPM, single-step",
            4,
            {"algorithm_type": "sde-dpmsolver"},
            "is not supported; supported values: dpmsolver[+][+], sde-dpm",
        ),
        ("DPM, single-step", 4, {"algorithm_type": "dpmsolver"}, "cannot end at zero noise"),
        ("KDPM2", 4, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "cannot be combined; use only one of them"),
        ("KDPM2", [500], {"use_karras_sigmas": True}, "use_karras_sigmas determines the timesteps"),
        ("EDM Euler", [500], {}, "EDM schedulers determine their own noise levels; give a number of steps"),
        (
            "EDM Euler",
            1,
            {"sigma_schedule": "exponential"},
            "with one step would start at the lowest noise level; use at",
        ),
        (
            "EDM Euler",
            4,
            {"sigma_schedule": "linear"},
            "sigma_schedule='linear' is not supported; supported values: karras, exp",
        ),
        (
            "EDM Euler",
            4,
            {"prediction_type": "sample"},
            "'sample' is not supported; supported values: epsilon, v_prediction",
        ),
        ("EDM DPM", 4, {"sigma_data": -1}, "sigma_data=-1 should be a positive number"),
        ("EDM DPM", 4, {"sigma_min": 90.0}, "sigma_min=90.0 should be below sigma_max=80.0"),
        ("EDM DPM", 4, SDE | {"solver_order": 3}, "supports solver_order 1 and 2, not 3"),
        ("IPNDM", [500], {}, "IPNDM determines its own times from 1 to 0; give a number of steps"),
        ("IPNDM", 1, {}, "with steps=1, IPNDM would ignore the network's output; use at least 2 steps"),
        ("IPNDM", 4, {"trained_betas": [0.1] * 1000}, "trained_betas=.* is not supported; supported values: None"),
        (
            "DDIM",
            4,
            {"trained_betas": [0.0] * 1000},
            "should have 1000 numbers .* of at least 0 and below 1, not all of",
        ),
        ("Euler", 1, {"beta_start": 0}, "the first of 1 steps has no noise to remove; use more steps"),
        ("LMS", 1, {"beta_start": 0, "use_exponential_sigmas": True}, "has no noise to remove|have the same timestep"),
    ],
)
def test_unsupported_options_and_steps(name, steps, options, message):
    with pytest.raises(ValueError, match=message):
        table_of(name, steps, **options)


def test_edm_schedulers_have_no_noise_shares():
    with pytest.raises(
        ValueError, match="EDMEulerScheduler has no betas, so the share of noise at a timestep is unknown"
    ):
        from_config(REST["EDM Euler"]).shares(np.array([3]))


@pytest.mark.parametrize("betas", [{"beta_start": 0}, LEADING_ZEROS, ZEROS_BETWEEN])
@pytest.mark.parametrize("name", tiny.SCHEDULERS | tiny.FURTHER)
def test_betas_of_zero(name, betas):
    """Rows are finite even at timesteps without noise, where updates leave x at x0."""
    for spacing in SPACINGS:
        for prediction in PREDICTIONS:
            options = {"timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": 0} | betas
            table = table_of(name, 10, **options)
            quiet = table.noise == 0
            assert not quiet[0]
            if quiet.any() and name not in ("DDIM", "DDPM", "LCM", "TCD", "PNDM", "PNDM, Runge-Kutta"):
                rows = jax.tree.map(lambda column, quiet=quiet: column[quiet], table.solver)
                assert not np.any(rows.noise)
                np.testing.assert_allclose(rows.x_from_start * rows.start_from_x, 1)


@pytest.mark.parametrize("name", tiny.SCHEDULERS | tiny.FURTHER)
def test_sampling_ends_at_x0_if_the_network_knows_it(name):
    """The network's eps always implies x0 = 0.3, so sampling ends at 0.3 even if the first betas are zero."""
    scheduler = from_config((tiny.SCHEDULERS | tiny.FURTHER)[name] | LEADING_ZEROS | {"set_alpha_to_one": True})
    table, solver = scheduler.table(10), SOLVERS[scheduler.solver](0.0)
    bars = np.cumprod(1 - np.array(LEADING_ZEROS["trained_betas"]))
    with jax.enable_x64(True):
        x = jnp.full((1, 1), table.initial_scale[0])
        state = solver.init(x)
        for i, t in enumerate(table.timestep):
            row = jax.tree.map(lambda column, i=i: column[i], table)
            # The noise that takes x0 = 0.3 to x, scaled to unit variance as in the network's input.
            bar = np.interp(t, np.arange(len(bars)), bars)
            epsilon = (x * row.input_scale - np.sqrt(bar) * 0.3) / max(np.sqrt(1 - bar), 1e-9)
            x, state = solver.update(x, state, epsilon, None, row, jnp.zeros)
    assert abs(float(x[0, 0]) - 0.3) < 1e-3


def test_tcd_takes_eta_by_row():
    """The etas are 0 (no noise), the default, and 1 (the step goes to timestep 0 before it adds noise)."""
    table, x = table_of("TCD", 4), np.ones((3, 2), np.float32)
    row = jax.tree.map(lambda column: column[1], table)
    assert row.solver.following == 499
    eta = np.array([0.0, 0.3, 1.0], np.float32)
    quiet, loud = (SOLVERS["tcd"](eta).update(x, (), x, None, row, draw)[0] for draw in (jnp.zeros, jnp.ones))
    bars = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    np.testing.assert_allclose((loud - quiet)[:, 0], np.sqrt(1 - bars[499] / bars[[499, 349, 0]]), rtol=1e-4, atol=1e-6)


def test_the_last_call_of_lcm_and_tcd_adds_no_noise():
    for name in ("LCM", "TCD"):
        table, x = table_of(name, 4), np.ones((1, 2), np.float32)
        solver = SOLVERS[from_config(REST[name]).solver](0.3)
        rows = [jax.tree.map(lambda column, i=i: column[i], table) for i in range(4)]
        noisy = [
            not np.array_equal(
                *(solver.update(x, solver.init(x), x, None, row, draw)[0] for draw in (jnp.zeros, jnp.ones))
            )
            for row in rows
        ]
        assert noisy == [True, True, True, False]
