"""The tables of all schedulers: timesteps, columns, and errors for unsupported options."""

import contextlib
from functools import partial

import jax
import numpy as np
import pytest
from support import tiny
from support.schedulers import dpm, scheduler, unipc

from sega_jax.method.schedules import from_config
from sega_jax.method.schedules.spacing import cumulative

ALPHAS = ["DDIM", "PNDM"]

NOISE = dpm(2, algorithm="dpmsolver")


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [
        ("leading", [801, 601, 401, 201, 1]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("linspace", [999, 749, 500, 250, 0]),
    ],
)
def test_timesteps(spacing, timesteps):
    options = {"timestep_spacing": spacing, "steps_offset": 1}
    table = scheduler("DDIM", **options).table(5)
    assert table.timestep.tolist() == timesteps
    assert table.call.tolist() == list(range(5))
    assert table.live.all()
    assert scheduler("PNDM", **options).table(5).timestep.tolist() == [timesteps[0], timesteps[1], *timesteps[1:]]
    twice = [timesteps[0], *np.repeat(timesteps[1:], 2).tolist()]
    np.testing.assert_allclose(scheduler("Heun", **options).table(5).timestep, twice, atol=0.5)


@pytest.mark.parametrize("steps", [4, 5, 50, 999])
@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_number_of_calls(name, steps):
    calls = {"PNDM": steps + 1, "PNDM, Runge-Kutta": steps + 9, "Heun": 2 * steps - 1}.get(name, steps)
    assert len(scheduler(name).table(steps).call) == calls


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_columns_have_the_same_length_and_are_finite(name, kind):
    options = {"trained_betas": [0.01] * 1000} if kind == "trained" else {"beta_schedule": kind}
    table = scheduler(name, **options).table(300)
    for leaf in jax.tree.leaves(table._replace(solver=table.solver._replace(clip=table.call))):
        assert leaf.shape[0] == len(table.call)
        assert np.isfinite(leaf).all()
    if name == "DDIM":
        assert (np.diff(table.solver.variance) < 0).all()
    else:
        assert table.solver.x_from_memory.shape[1] == (13 if "Runge" in name else 4)


@pytest.mark.parametrize(
    ("name", "scale"),
    [("DDIM", 1.0), ("UniPC", 1.0), ("Euler", 14.6146), ("LMS", 14.6146), ("Heun", 14.6146)],
)
def test_initial_noise_scale(name, scale):
    """For solvers that step along sigma, the scale is the largest sigma for Stable Diffusion's betas; for others, it is
    1."""
    np.testing.assert_allclose(scheduler(name).table(7).initial_scale, scale, rtol=1e-5)


def test_karras_sigmas():
    """Compares the sigmas with Karras et al. 2022, eq. 5."""
    sigmas = 1 / scheduler("Euler", use_karras_sigmas=True, sigma_min=0.1, sigma_max=10).table(5).input_scale
    expected = (10 ** (1 / 7) + np.linspace(0, 1, 5) * (0.1 ** (1 / 7) - 10 ** (1 / 7))) ** 7
    np.testing.assert_allclose(np.sqrt(sigmas**2 - 1), expected, rtol=1e-9)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-1, ValueError), (1001, ValueError), (2.5, TypeError)])
@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_steps_out_of_range(name, steps, error):
    with pytest.raises(error, match=rf"steps={steps} should be (from 1 to 1000|a whole number)"):
        scheduler(name).table(steps)


@pytest.mark.parametrize(
    "steps", [True, None, np.nan, [], [5.0], [True], [[5]], [[5], [4, 3]], ["smart27"], {5, 4}, [2**70], b"fast27"]
)
def test_steps_of_the_wrong_type(steps):
    with pytest.raises(
        TypeError, match=r"should be a whole number, descending timesteps such as .*, or one of fast27, smart"
    ):
        scheduler("DDIM").table(steps)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("5", "steps='5' should be a whole number, or one of fast27, smart27, .*super100"),
        ([1000, 0], "steps has timestep 1000, but timesteps should be from 0 to 999"),
        (np.arange(3, -2, -1), "steps has timestep -1, but timesteps should be from 0 to 999"),
        ([5, 3, 3], "steps has timestep 3 after 3, but timesteps should descend without repeats"),
        (np.array([3, 9], np.uint8), "steps has timestep 9 after 3, but timesteps should descend"),
    ],
)
def test_invalid_timesteps(steps, message):
    with pytest.raises(ValueError, match=message):
        scheduler("DDIM").table(steps)


def test_named_timesteps_need_enough_training_timesteps():
    family = scheduler("DDPM", num_train_timesteps=100)
    assert len(family.table("smart50").timestep) == 50
    with pytest.raises(
        ValueError, match="a section has only 10 of the 100 training timesteps, but the named list needs 14"
    ):
        family.table("super100")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("PNDM", {}, "PNDM needs steps of equal length; give a number of steps"),
        ("PNDM, Runge-Kutta", {}, "PNDM needs steps of equal length; give a number of steps"),
        ("DPM", {"use_karras_sigmas": True}, "use_karras_sigmas determines the timesteps; give a number"),
        ("LMS", {"use_beta_sigmas": True}, "use_beta_sigmas determines the timesteps; give a number"),
        (
            "Euler",
            {"interpolation_type": "log_linear"},
            "interpolation_type='log_linear' determines the timesteps; give a number",
        ),
    ],
)
def test_options_that_exclude_custom_timesteps(name, options, message):
    with pytest.raises(ValueError, match=f"Scheduler: {message}"):
        scheduler(name, **options).table("smart27")


@pytest.mark.parametrize("options", [dpm(2, "heun"), dpm(3), dpm(2, algorithm="dpmsolver")])
def test_a_step_between_equal_noise_levels_changes_nothing(options):
    """The last step starts at timestep 0 and ends at the smallest training noise level, which also belongs to timestep
    0."""
    solver = scheduler("DPM", **options).table("smart27").solver
    assert solver.x_from_start[-1] == 1
    assert not solver.x_from_memory[-1].any()


CUSTOM = [name for name in tiny.SCHEDULERS if "PNDM" not in name]


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_timesteps(name):
    """Passing a schedule's timesteps as a list gives the same table as passing the number of steps."""
    family = scheduler(name, timestep_spacing="leading")
    by_number = family.table(8)
    timesteps = np.unique(by_number.timestep.astype(int))[::-1]
    assert len(timesteps) == 8
    for steps in (timesteps, timesteps.tolist(), tuple(timesteps)):
        jax.tree.map(np.testing.assert_array_equal, family.table(steps), by_number)


@pytest.mark.parametrize(
    "name", ["fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super40", "super100"]
)
def test_named_timesteps(name):
    timesteps = scheduler("DDPM").table(name).timestep
    assert len(timesteps) == int(name.strip("fastmrupe"))
    assert (timesteps[0], timesteps[-1]) == (999, 0)
    assert (np.diff(timesteps) < 0).all()


def test_named_timesteps_are_spread_over_sections():
    """Seven equal sections have 7, 4, 2, 1, 2, 4 and 7 timesteps."""
    first, *_, last = np.split(scheduler("DDPM").table("smart27").timestep, [7, 11, 13, 14, 16, 20])
    assert first.tolist() == [999, 976, 952, 928, 905, 882, 858]
    assert last.tolist() == [142, 118, 95, 71, 47, 24, 0]


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_a_list_of_timesteps_is_a_process_with_its_own_betas(name):
    """Each beta covers the step from one listed timestep to the next (Nichol & Dhariwal 2021, section 4)."""
    options = {"beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": True, "variance_type": "learned_range"}
    respaced = scheduler(name, **options).table("smart50")
    bars = cumulative(scheduler(name, **options).options)[respaced.timestep.astype(int)[::-1]]
    betas = 1 - bars / np.append(1, bars[:-1])
    trained = scheduler(
        name, **options | {"trained_betas": betas.tolist(), "num_train_timesteps": 50, "steps_offset": 0}
    ).table(50)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), respaced.solver, trained.solver)


def test_cosine_betas():
    """The betas follow Nichol & Dhariwal 2021, eq. 17, except for the last one, which is capped."""
    bars = cumulative(scheduler("DDPM", beta_schedule="squaredcos_cap_v2").options)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(bars[:999], f[1:1000] / f[0], rtol=1e-9)
    np.testing.assert_allclose(bars[999], bars[998] * 0.001, rtol=1e-9)


# These schedulers round steps + 1 timesteps, so there may be too few training timesteps.
COINCIDING = ("DPM", "DPM, stochastic", "UniPC")


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        # LMS rows are integrals, which are slow to compute.
        pytest.param(name, spacing, marks=[pytest.mark.slow] if name == "LMS" and spacing != "leading" else [])
        for name in tiny.SCHEDULERS
        for spacing in ("leading", "trailing", "linspace")
    ],
)
def test_any_number_of_steps_has_finite_rows_or_is_an_error(name, spacing):
    """A number is rejected only if it is so large (or, for Runge-Kutta, so small) that two points coincide."""
    family, every = scheduler(name, timestep_spacing=spacing, steps_offset=0), 250 if name == "LMS" else 37
    for steps in [*range(1, 999, every), 2, 3, 4, 61, 103, 999, 1000]:
        if (steps > 500 and name in COINCIDING) or (steps < 4 and "Runge" in name):
            with contextlib.suppress(ValueError):
                family.table(steps)
            continue
        table = family.table(steps)
        assert table.timestep.min() >= 0
        assert len(table.call) >= steps
        assert (np.diff(table.timestep)[13:] <= 0).all()


@pytest.mark.parametrize("name", ALPHAS)
def test_an_offset_beyond_the_training_timesteps(name):
    with pytest.raises(ValueError, match=r"1000 steps with steps_offset=1 reach timestep 1000, but .*; use fewer"):
        scheduler(name).table(1000)
    assert len(scheduler(name, steps_offset=0).table(1000).call) >= 1000


def test_runge_kutta_needs_at_least_four_steps():
    with pytest.raises(ValueError, match="steps=3 should be at least 4"):
        scheduler("PNDM, Runge-Kutta").table(3)


def test_zero_snr_excludes_epsilon_prediction():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for name in ("DDIM", "DDPM"):
        with pytest.raises(ValueError, match="has no signal, so x0 cannot be computed from epsilon"):
            scheduler(name, **options).table(10)
        assert scheduler(name, prediction_type="v_prediction", **options).table(10).timestep[0] == 999


@pytest.mark.parametrize("name", ["KarrasVeScheduler", None, 3, ["DDIMScheduler"]])
def test_errors_list_the_supported_schedulers(name):
    with pytest.raises(
        ValueError, match=r"is not supported; supported schedulers: DDIMScheduler, PNDMScheduler, .*UniPC"
    ):
        from_config({"_class_name": name})


@pytest.mark.parametrize(
    ("option", "value", "listed"),
    [
        ("beta_schedule", "sigmoid", "linear, scaled_linear, squaredcos_cap_v2"),
        ("prediction_type", "flow_prediction", "epsilon, v_prediction, sample"),
        ("timestep_spacing", "karras", "leading, trailing, linspace"),
        ("timestep_spacing", ["leading"], "leading, trailing, linspace"),
    ],
)
@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_errors_list_the_supported_values(name, option, value, listed):
    with pytest.raises(ValueError, match=f"Scheduler: {option}=.* is not supported; supported values: {listed}"):
        scheduler(name, **{option: value})


def test_errors_list_the_supported_options():
    with pytest.raises(ValueError, match=r"beta_bend; the supported options are beta_end, .*timestep_spacing"):
        scheduler("DDIM", beta_bend=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDIM", {"dynamic_thresholding_ratio": 95}, r"dynamic_thresholding_ratio=95 should be a number in \[0, 1\]"),
        ("DDPM", {"sample_max_value": 0.5}, "sample_max_value=0.5 should be a number of at least 1"),
        ("DPM", NOISE | {"thresholding": True}, "'dpmsolver' predicts noise, but thresholding .*; use 'dpmsolver[+]"),
        ("UniPC", unipc(2, "bh2", data=False) | {"thresholding": True}, "predict_x0=False predicts noise, but thresh"),
        ("DPM", {"use_lu_lambdas": True}, "use_lu_lambdas=True is not supported; supported values: False"),
        ("UniPC", {"use_flow_sigmas": True}, "use_flow_sigmas=True is not supported; supported values: False"),
        ("UniPC", {"solver_p": {}}, "solver_p={} is not supported; supported values: None"),
        ("DPM", {"solver_order": 4}, "solver_order=4 should be 1, 2 or 3"),
        ("DPM", {"solver_type": "kutta"}, "solver_type='kutta' is not supported; supported values: midpoint, heun"),
        ("DPM", {"algorithm_type": "dpmsolver"}, "cannot end at zero noise; use final_sigmas_type='sigma_min'"),
        ("DPM", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "supports solver_order 1 and 2, not 3"),
        ("UniPC", {"predict_x0": False}, "cannot end at zero noise; use final_sigmas_type='sigma_min'"),
        ("UniPC", {"lower_order_final": False}, "last step of order 1 can end at zero noise; use lower_order"),
        ("UniPC", {"disable_corrector": [0, "1"]}, "should be a list of call numbers"),
        ("UniPC", {"disable_corrector": 3}, "should be a list of call numbers"),
        ("Euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "cannot be combined; use only one of them"),
        ("Euler", {"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min=3.0 should be below sigma_max=2.0"),
        ("Euler", {"sigma_max": -1.0}, "sigma_max=-1.0 should be a positive number"),
        ("DDPM", {"variance_type": "learned"}, "is not supported; supported values: fixed_small, .*learned_range"),
    ],
)
def test_unsupported_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        scheduler(name, **options)


def same_tables(first, second):
    pairs = zip(jax.tree.leaves(first.table(7)), jax.tree.leaves(second.table(7)), strict=True)
    return all(np.array_equal(*leaves) for leaves in pairs)


def test_options_of_other_schedulers_have_no_effect():
    options = {"lower_order_final": True, "use_karras_sigmas": True, "solver_order": 2, "variance_type": "fixed_small"}
    assert same_tables(scheduler("DDIM"), scheduler("DDIM", **options))


def test_values_of_other_schedulers_are_translated_as_in_diffusers():
    assert same_tables(scheduler("DPM"), scheduler("DPM", solver_type="bh2"))
    assert same_tables(scheduler("UniPC", solver_type="bh2"), scheduler("UniPC", solver_type="midpoint"))
    assert not same_tables(scheduler("UniPC"), scheduler("UniPC", solver_type="bh1"))


def test_null_means_the_default():
    assert same_tables(scheduler("DDPM"), scheduler("DDPM", variance_type=None, trained_betas=None))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_train_timesteps", "1000"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", -5),
        ("num_train_timesteps", 10.5),
        ("beta_start", -0.1),
        ("beta_end", 1),
        ("beta_end", "0.02"),
        ("beta_start", np.nan),
        ("steps_offset", -1),
        ("steps_offset", True),
        ("set_alpha_to_one", 1),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", [0.1] * 999 + [1.5]),
        ("trained_betas", "none"),
        ("trained_betas", ["a"] * 1000),
        ("clip_sample", "yes"),
        ("clip_sample_range", "x"),
        ("clip_sample_range", -1),
        ("clip_sample_range", np.nan),
    ],
)
def test_invalid_values_of_options(option, value):
    with pytest.raises(ValueError, match=f"DDIMScheduler: .*{option}"):
        scheduler("DDIM", **{"clip_sample": True} | {option: value})
