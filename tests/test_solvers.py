"""Tables and solvers: what is refused, known values, and the order at which they reach a solution in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sega_jax.schedules import from_config
from sega_jax.solvers import SOLVERS, ddim

SCHEDULERS = {"DDIMScheduler": tiny.DDIM, "PNDMScheduler": tiny.PNDM}
NAMES = list(SCHEDULERS)
# Data that are normal, so that the probability flow is known: x_t is sqrt(abar) m + sqrt(v) times a constant.
MEAN, VARIANCE = 0.7, 0.25


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def scheduler(name, **options):
    return from_config(SCHEDULERS[name] | options)


def abar(config):
    root = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"])
    return np.cumprod(1 - root**2)


def denoiser(bars, prediction="epsilon"):
    """The best prediction for the normal data, by timestep."""
    bars = jnp.asarray(bars)

    def predict(x, timestep):
        bar = bars[timestep.astype(int)]
        a, b = jnp.sqrt(bar), jnp.sqrt(1 - bar)
        epsilon = b * (x - a * MEAN) / (bar * VARIANCE + 1 - bar)
        x0 = (x - b * epsilon) / a
        return epsilon if prediction == "epsilon" else a * epsilon - b * x0

    return predict


def solve(scheduler, steps, x, predict, draw=jnp.zeros, eta=0.0):
    """The trajectory, [calls, ...]."""
    solver, table = SOLVERS[scheduler.solver](eta), scheduler.table(steps)

    @jax.jit
    def run(x, table):
        def call(carry, row):
            x, state = carry
            x, state = solver.update(x, state, predict(x, row.timestep), None, row, draw)
            return (x, state), x

        return jax.lax.scan(call, (x, solver.init(x)), table)[1]

    return run(jnp.asarray(x), table)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "prediction", "order"),
    [
        ("DDIMScheduler", "epsilon", 1),
        ("DDIMScheduler", "v_prediction", 1),
        ("PNDMScheduler", "epsilon", 2),
        # diffusers takes the mean of v over several calls, where only that of epsilon is of second order.
        ("PNDMScheduler", "v_prediction", 1),
    ],
)
def test_order_of_convergence(name, prediction, order):
    """Over the first four fifths of the way; at its end the square root of the noise has no derivative."""
    options = {"num_train_timesteps": 10000, "beta_start": 0.000085, "beta_end": 0.0012, "timestep_spacing": "trailing"}
    family, bars = scheduler(name, prediction_type=prediction, **options), abar(options)
    start, end = bars[-1], bars[1999]
    spread = np.sqrt((end * VARIANCE + 1 - end) / (start * VARIANCE + 1 - start))
    exact = np.sqrt(end) * MEAN + spread * (1.5 - np.sqrt(start) * MEAN)
    steps = np.array([200, 250, 400, 500])
    ends = [solve(family, s, [[1.5]], denoiser(bars, prediction))[-s // 5 - 1, 0, 0] for s in steps]
    errors = np.abs(np.array(ends) - exact)
    assert abs(np.polyfit(np.log(steps), -np.log(errors), 1)[0] - order) < 0.05
    assert errors[-1] < 2e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_v_and_epsilon_are_one_trajectory(spacing, eta):
    x, noise = np.random.default_rng(0).standard_normal((2, 3, 2))
    trajectories = []
    for prediction in ("epsilon", "v_prediction"):
        family = scheduler("DDIMScheduler", prediction_type=prediction, timestep_spacing=spacing)
        predict = denoiser(abar(tiny.DDIM), prediction)
        trajectories.append(solve(family, 20, x, predict, lambda shape: jnp.asarray(noise), eta))
    np.testing.assert_allclose(*trajectories, rtol=1e-11, atol=1e-11)


def test_eta_is_the_share_of_noise_of_each_row():
    x = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)
    eta = np.array([0.0, 0.0, 1.0])
    quiet, loud = (
        solve(scheduler("DDIMScheduler"), 5, x, denoiser(abar(tiny.DDIM)), draw, eta)
        for draw in (jnp.zeros, lambda shape: jnp.full(shape, 100.0))
    )
    assert np.array_equal(quiet[:, :2], loud[:, :2])
    assert (quiet[:, 2] != loud[:, 2]).all()


@pytest.mark.usefixtures("x64")
def test_ddim_with_all_noise_is_ancestral_sampling():
    """With eta = 1 and every timestep, the posterior of Ho et al. 2020, eq. 7."""
    family = scheduler("DDIMScheduler", num_train_timesteps=50, steps_offset=0)
    bars, noise = abar(family.config), 0.4
    x, found = solve(family, 50, [[1.3]], denoiser(bars), lambda shape: jnp.full(shape, noise), 1.0)[:2]
    now, before = bars[48], bars[47]
    beta = 1 - now / before
    epsilon = np.sqrt(1 - now) * (x - np.sqrt(now) * MEAN) / (now * VARIANCE + 1 - now)
    x0 = (x - np.sqrt(1 - now) * epsilon) / np.sqrt(now)
    mean = np.sqrt(before) * beta / (1 - now) * x0 + np.sqrt(now / before) * (1 - before) / (1 - now) * x
    np.testing.assert_allclose(found, mean + np.sqrt((1 - before) / (1 - now) * beta) * noise, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_ddim_clips_x0_where_the_config_says_so():
    options = {"clip_sample": True, "clip_sample_range": 0.5}
    free, clipped = (
        solve(scheduler("DDIMScheduler", **o), 1, [[3.0]], lambda x, timestep: 0.1 * x)[0, 0, 0] for o in ({}, options)
    )
    bars = abar(tiny.DDIM)
    x0 = (3 - np.sqrt(1 - bars[1]) * 0.3) / np.sqrt(bars[1])
    for found, wanted in ((free, x0), (clipped, 0.5)):
        np.testing.assert_allclose(found, np.sqrt(bars[0]) * wanted + np.sqrt(1 - bars[0]) * 0.3, rtol=1e-12)


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [
        ("leading", [801, 601, 401, 201, 1]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("linspace", [999, 749, 500, 250, 0]),
    ],
)
def test_timesteps(spacing, timesteps):
    table = scheduler("DDIMScheduler", timestep_spacing=spacing).table(5)
    assert table.timestep.tolist() == timesteps
    assert table.call.tolist() == list(range(5))
    assert table.live.all()
    again = scheduler("PNDMScheduler", timestep_spacing=spacing).table(5)
    assert again.timestep.tolist() == [timesteps[0], timesteps[1], *timesteps[1:]]


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 999])
def test_calls(steps):
    assert len(scheduler("DDIMScheduler").table(steps).call) == steps
    assert len(scheduler("PNDMScheduler").table(steps).call) == steps + (steps > 1)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_finite_and_noise_falls(name, kind):
    options = {"trained_betas": [0.01] * 1000} if kind == "trained" else {"beta_schedule": kind}
    table = scheduler(name, **options).table(999)
    for leaf in jax.tree.leaves(table.solver._replace(clip=np.zeros(999)) if name == "DDIMScheduler" else table.solver):
        assert leaf.shape[0] == len(table.call)
        assert np.isfinite(leaf).all()
    if name == "DDIMScheduler":
        assert (np.diff(table.solver.variance) < 0).all()


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_ends_where_the_config_says(name, final):
    """A denoiser that says 0 leaves x / sqrt(abar): 1 at the end, or abar_0 without `set_alpha_to_one`."""
    family, bars = scheduler(name, set_alpha_to_one=final), abar(tiny.DDIM)
    end = solve(family, 10, np.ones((1, 1), np.float32), lambda x, timestep: jnp.zeros_like(x))[-1, 0, 0]
    np.testing.assert_allclose(end, np.sqrt((1 if final else bars[0]) / bars[901]), rtol=1e-5)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-1, ValueError), (1001, ValueError), (2.5, TypeError)])
@pytest.mark.parametrize("name", NAMES)
def test_steps_out_of_range(name, steps, error):
    with pytest.raises(error, match=rf"steps={steps} should be (from 1 to 1000|a whole number)"):
        scheduler(name).table(steps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps_has_finite_rows(name, spacing):
    """diffusers' "trailing" has one timestep too many, -1, for 61 steps and others."""
    family = scheduler(name, timestep_spacing=spacing, set_alpha_to_one=True, steps_offset=0)
    for steps in range(1, 1001):
        table = family.table(steps)
        assert len(table.call) == steps + (name == "PNDMScheduler" and steps > 1)
        assert table.timestep.min() >= 0
        assert all(np.isfinite(c).all() for field, c in table.solver._asdict().items() if field != "clip")


@pytest.mark.parametrize("steps", [True, "5", None, [5], np.nan])
def test_steps_of_another_type(steps):
    with pytest.raises(TypeError, match=r"steps=.* should be a whole number"):
        scheduler("DDIMScheduler").table(steps)


@pytest.mark.parametrize("name", NAMES)
def test_an_offset_beyond_the_training(name):
    with pytest.raises(ValueError, match=r"1000 steps ask for timestep 1000 of 1000 \(steps_offset 1\); take fewer"):
        scheduler(name).table(1000)
    assert len(scheduler(name, steps_offset=0).table(1000).call) >= 1000


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", None, 3, ["DDIMScheduler"]])
def test_unknown_schedulers_list_the_known(name):
    with pytest.raises(ValueError, match="is not supported, only DDIMScheduler, PNDMScheduler"):
        from_config({"_class_name": name})


@pytest.mark.parametrize(
    ("option", "value", "listed"),
    [
        ("beta_schedule", "sigmoid", "linear, scaled_linear, squaredcos_cap_v2"),
        ("prediction_type", "sample", "epsilon, v_prediction"),
        ("timestep_spacing", "karras", "leading, trailing, linspace"),
        ("timestep_spacing", ["leading"], "leading, trailing, linspace"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_unknown_choices_list_the_known(name, option, value, listed):
    with pytest.raises(ValueError, match=f"{name}: {option}=.* is not supported, only {listed}"):
        scheduler(name, **{option: value})


def test_unknown_options_list_the_known():
    with pytest.raises(ValueError, match=r"unknown options beta_bend; supported are beta_end, .*timestep_spacing"):
        scheduler("DDIMScheduler", beta_bend=0.1)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "rescale_betas_zero_snr", True),
        ("PNDMScheduler", "skip_prk_steps", False),
    ],
)
def test_options_that_are_fixed(name, option, value):
    with pytest.raises(ValueError, match=f"{name}: {option}={value} is not supported, only {not value}"):
        scheduler(name, **{option: value})


def test_options_of_other_schedulers_mean_nothing():
    options = {"lower_order_final": True, "use_karras_sigmas": True, "solver_order": 2, "variance_type": "fixed_small"}
    plain, carried = scheduler("DDIMScheduler").table(7), scheduler("DDIMScheduler", **options).table(7)
    assert all(np.array_equal(*leaves) for leaves in zip(jax.tree.leaves(plain), jax.tree.leaves(carried), strict=True))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_train_timesteps", "1000"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", -5),
        ("num_train_timesteps", 10.5),
        ("beta_start", 0),
        ("beta_end", 1),
        ("beta_end", "0.02"),
        ("beta_start", np.nan),
        ("beta_start", None),
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
def test_values_of_another_kind(option, value):
    with pytest.raises(ValueError, match=f"DDIMScheduler: .*{option}"):
        scheduler("DDIMScheduler", **{"clip_sample": True} | {option: value})


def test_eta_is_not_for_plms():
    x = np.ones((1, 1), np.float32)
    results = [solve(scheduler("PNDMScheduler"), 5, x, denoiser(abar(tiny.PNDM)), eta=eta) for eta in (0.0, 1.0)]
    assert np.array_equal(*results)


def test_states_keep_the_dtype_of_x():
    x = jnp.ones((2, 3), jnp.float32)
    table = scheduler("DDIMScheduler").table(3)
    row = jax.tree.map(lambda column: column[0], table)
    found, _ = ddim(0.5).update(x, (), x.astype(jnp.bfloat16), None, row, jnp.ones)
    assert found.dtype == jnp.float32
