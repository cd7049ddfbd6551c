"""Compares solvers with known values, and tests their order of convergence to a closed-form solution."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.schedulers import abar, dpm, scheduler, unipc

from sega_jax.method.schedules import from_config
from sega_jax.method.schedules.spacing import cumulative
from sega_jax.method.solvers import SOLVERS

ALPHAS = ["DDIM", "PNDM"]
# For normally distributed data, the probability flow is known: x_t is sqrt(abar) m + sqrt(v) times a constant.
MEAN, VARIANCE = 0.7, 0.25
FINE = {"num_train_timesteps": 10000, "beta_start": 0.000085, "beta_end": 0.0012, "timestep_spacing": "trailing"}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@cache
def denoiser(prediction="epsilon", fine=False):
    """Returns the optimal denoiser for normally distributed data, as a function of x and the timestep."""
    bars = abar(FINE if fine else tiny.SD_BETAS)

    def predict(x, timestep):
        bar = jnp.asarray(bars, x.dtype)[timestep.astype(int)]
        a, b = jnp.sqrt(bar), jnp.sqrt(1 - bar)
        epsilon = b * (x - a * MEAN) / (bar * VARIANCE + 1 - bar)
        x0 = (x - b * epsilon) / a
        return {"epsilon": epsilon, "v_prediction": a * epsilon - b * x0, "sample": x0}[prediction]

    return predict


@partial(jax.jit, static_argnames=("solver", "predict", "draw"))
def _trajectory(x, table, eta, *, solver, predict, draw):
    method = SOLVERS[solver](eta)

    def call(carry, row):
        x, state = carry
        x, state = method.update(x, state, predict(x * row.input_scale, row.timestep), None, row, draw)
        return (x, state), x

    return jax.lax.scan(call, (x, method.init(x)), table)[1]


def solve(scheduler, steps, x, predict, draw=jnp.zeros, eta=0.0):
    """Returns the trajectory [calls, ...]."""
    x, table = jnp.asarray(x), scheduler.table(steps)
    table = jax.tree.map(lambda column: column if column.dtype.kind != "f" else column.astype(x.dtype), table)
    return _trajectory(x, table, jnp.asarray(eta, x.dtype), solver=scheduler.solver, predict=predict, draw=draw)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "options", "prediction", "order"),
    [
        ("DDIM", {}, "epsilon", 1),
        ("DDIM", {}, "v_prediction", 1),
        ("DDIM", {}, "sample", 1),
        ("PNDM", {}, "epsilon", 2),
        # diffusers averages v over several calls, which is first-order; averaging epsilon is second-order.
        ("PNDM", {}, "v_prediction", 1),
        ("PNDM", {}, "sample", 2),
        # The order would be four, but PNDM's equation 9 replaces abar between timesteps with abar at the nearest
        # timestep.
        ("PNDM, Runge-Kutta", {}, "epsilon", 2),
        ("Euler", {}, "epsilon", 1),
        ("Heun", {}, "epsilon", 2),
        ("Heun", {}, "v_prediction", 2),
        # Methods that begin with a first-order step are second-order overall.
        ("LMS", {}, "epsilon", 2),
        ("DPM", dpm(1), "epsilon", 1),
        ("DPM", dpm(2), "epsilon", 2),
        ("DPM", dpm(2), "sample", 2),
        ("DPM", dpm(2, "heun"), "v_prediction", 2),
        ("DPM", dpm(2, "midpoint", "dpmsolver"), "epsilon", 2),
        ("DPM", dpm(2, "heun", "dpmsolver"), "epsilon", 2),
        ("DPM", dpm(3), "epsilon", 2),
        # The corrector adds an order.
        ("UniPC", unipc(1, "bh1"), "epsilon", 2),
        ("UniPC", unipc(1, "bh2"), "epsilon", 2),
        ("UniPC", unipc(2, "bh1"), "epsilon", 3),
        ("UniPC", unipc(2, "bh2", data=False), "v_prediction", 3),
        ("UniPC", unipc(3, "bh2"), "sample", 4),
        pytest.param("DEIS", {"solver_order": 1}, "epsilon", 1, marks=pytest.mark.slow),
        pytest.param("DEIS", {}, "v_prediction", 2, marks=pytest.mark.slow),
    ],
)
def test_order_of_convergence(name, options, prediction, order):
    """Only the first four fifths of the trajectory are compared; at the end, the square root of the noise has no
    derivative."""
    family, bars = scheduler(name, prediction_type=prediction, **FINE, **options), abar(FINE)
    start, end = bars[-1], bars[1999]
    spread = np.sqrt((end * VARIANCE + 1 - end) / (start * VARIANCE + 1 - start))
    exact = np.sqrt(end) * MEAN + spread * (1.5 - np.sqrt(start) * MEAN)
    steps, errors = np.array([200, 250, 400, 500]), []
    for s in steps:
        scale, call = family.table(s).input_scale, -2 * s // 5 if name == "Heun" else -s // 5 - 1
        path = solve(family, s, [[1.5 / scale[0]]], denoiser(prediction, fine=True))
        errors.append(abs(path[call, 0, 0] * scale[call + 1] - exact))
    slope = np.polyfit(np.log(steps), -np.log(errors), 1)[0]
    assert abs(slope - order) < (0.35 if name == "LMS" else 0.12)
    assert errors[-1] < 2e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "spacing", ["leading", *(pytest.param(s, marks=pytest.mark.slow) for s in ("trailing", "linspace"))]
)
@pytest.mark.parametrize("name", [name for name in tiny.SCHEDULERS if "PNDM" not in name])
def test_all_prediction_types_give_the_same_trajectory(name, spacing):
    """The timesteps are integers. PNDM is excluded, because the quantities it averages depend on the prediction
    type."""
    x, drawn = np.random.default_rng(0).standard_normal((2, 3, 2))

    def draw(shape):
        return jnp.asarray(drawn)

    trajectories = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        family = scheduler(name, prediction_type=prediction, timestep_spacing=spacing)
        predict = denoiser(prediction)
        trajectories.append(solve(family, 20 if spacing != "linspace" else 28, x, predict, draw, 0.7))
    assert np.isfinite(trajectories[0]).all()
    for other in trajectories[1:]:
        np.testing.assert_allclose(trajectories[0], other, rtol=1e-9, atol=1e-9)


def test_each_row_has_its_own_eta():
    x = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)
    eta = np.array([0.0, 0.0, 1.0])
    quiet, loud = (solve(scheduler("DDIM"), 5, x, denoiser(), draw, eta) for draw in (jnp.zeros, hundreds))
    assert np.array_equal(quiet[:, :2], loud[:, :2])
    assert (quiet[:, 2] != loud[:, 2]).all()


def hundreds(shape):
    return jnp.full(shape, 100.0)


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_only_ancestral_solvers_draw_noise(name):
    quiet, loud = (solve(scheduler(name), 5, [[1.5]], denoiser(), draw) for draw in (jnp.zeros, hundreds))
    assert np.array_equal(quiet, loud) != (name in ("DDPM", "Euler ancestral", "DPM, stochastic"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["DDPM", "Euler ancestral", "DPM, stochastic"])
def test_ancestral_solvers_reach_the_distribution_of_the_data(name):
    """Doubling the number of steps halves the error in the variance. Every call is an affine map for this denoiser."""
    options = {"solver_order": 1} if name == "DPM, stochastic" else {}
    family, errors = scheduler(name, timestep_spacing="trailing", **options), []
    for steps in (500, 1000):
        table = family.table(steps)
        path = solve(family, steps, [[0.0, 1.0]], denoiser())[:, 0]
        np.testing.assert_allclose(path[-1, 0], MEAN, rtol=0.03)
        # A call scales a deviation by the ratio of successive distances between two trajectories.
        distance = np.concatenate([[1.0], path[:, 1] - path[:, 0]])
        variance = float(table.initial_scale[0]) ** 2
        for factor, noise in zip(distance[1:] / distance[:-1], table.solver.noise, strict=True):
            variance = factor**2 * variance + noise**2
        errors.append(variance - VARIANCE)
    assert abs(errors[1]) < 0.02 * VARIANCE
    assert 1.7 < errors[0] / errors[1] < 2.2


@pytest.mark.usefixtures("x64")
def test_ddim_with_eta_1_is_ddpm():
    """With all timesteps, both solvers sample from the posterior in Ho et al. 2020, eq. 7."""
    family, fresh = scheduler("DDIM", steps_offset=0), 0.4
    bars = abar(family.options)
    x, found = solve(family, 1000, [[1.3]], denoiser(), lambda shape: jnp.full(shape, fresh), 1.0)[:2]
    now, before = bars[998], bars[997]
    beta = 1 - now / before
    epsilon = np.sqrt(1 - now) * (x - np.sqrt(now) * MEAN) / (now * VARIANCE + 1 - now)
    x0 = (x - np.sqrt(1 - now) * epsilon) / np.sqrt(now)
    mean = np.sqrt(before) * beta / (1 - now) * x0 + np.sqrt(now / before) * (1 - before) / (1 - now) * x
    np.testing.assert_allclose(found, mean + np.sqrt((1 - before) / (1 - now) * beta) * fresh, rtol=1e-12)
    ddpm = solve(scheduler("DDPM", steps_offset=0), 1000, [[1.3]], denoiser(), lambda shape: jnp.full(shape, fresh))
    np.testing.assert_allclose(ddpm[1], found, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_ddim_clips_x0_if_the_config_says_so():
    options = {"clip_sample": True, "clip_sample_range": 0.5}
    free, clipped = (
        solve(scheduler("DDIM", **o), 1, [[3.0]], lambda x, timestep: 0.1 * x)[0, 0, 0] for o in ({}, options)
    )
    bars = abar(tiny.DDIM)
    x0 = (3 - np.sqrt(1 - bars[1]) * 0.3) / np.sqrt(bars[1])
    for found, expected_x0 in ((free, x0), (clipped, 0.5)):
        np.testing.assert_allclose(found, np.sqrt(bars[0]) * expected_x0 + np.sqrt(1 - bars[0]) * 0.3, rtol=1e-12)


@pytest.mark.parametrize(("ratio", "most"), [(0.3, 4.0), (0.9, 4.0), (0.9, 1.5), (1.0, 100.0), (0.9, 1)])
@pytest.mark.parametrize("name", ["DDIM", "DDPM", "DPM", "UniPC"])
def test_dynamic_thresholding(name, ratio, most):
    """Follows Saharia et al. 2022, section 2.3. The network predicts x0, which the last step returns unchanged."""
    options = {"dynamic_thresholding_ratio": ratio, "sample_max_value": most, "set_alpha_to_one": True}
    family = scheduler(name, prediction_type="sample", thresholding=True, clip_sample=True, **options)
    pictures = np.random.default_rng(0).standard_normal((3, 2, 5, 3)) * np.reshape([0.1, 1, 4], (3, 1, 1, 1))
    end = solve(family, 5, np.ones_like(pictures, np.float32), lambda x, t: jnp.asarray(pictures, x.dtype))[-1]
    for found, picture in zip(end, pictures, strict=True):
        s = min(max(np.quantile(abs(picture), ratio), 1), most)
        np.testing.assert_allclose(found, np.clip(picture, -s, s) / s, rtol=1e-4, atol=1e-5)


def test_new_thresholds_compile_nothing(compilations):
    def run(**options):
        return solve(scheduler("DDPM", thresholding=True, **options), 5, np.ones((1, 4), np.float32), denoiser())

    run()
    compilations.clear()
    run(dynamic_thresholding_ratio=0.5, sample_max_value=2.0)
    assert not compilations


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("name", ALPHAS)
def test_the_last_step_ends_at_the_final_abar_of_the_config(name, final):
    """The final abar is 1, or abar_0 without `set_alpha_to_one`. If the denoiser returns 0, x / sqrt(abar) is
    constant."""
    family, bars = scheduler(name, set_alpha_to_one=final), abar(tiny.DDIM)
    end = solve(family, 10, np.ones((1, 1), np.float32), lambda x, timestep: jnp.zeros_like(x))[-1, 0, 0]
    np.testing.assert_allclose(end, np.sqrt((1 if final else bars[0]) / bars[901]), rtol=1e-5)


@pytest.mark.parametrize("name", ["Euler", "Heun", "LMS", "DPM", "UniPC", "DDPM"])
def test_sampling_ends_at_x0_if_the_network_knows_it(name):
    """The last step returns x0 unchanged, for any initial noise."""
    family = scheduler(name, prediction_type="sample")
    end = solve(family, 10, np.ones((1, 1), np.float32), lambda x, timestep: jnp.full_like(x, 0.3))[-1, 0, 0]
    np.testing.assert_allclose(end, 0.3, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in tiny.SCHEDULERS if name != "DDIM"])
def test_eta_has_an_effect_only_on_ddim(name):
    x = np.ones((1, 1), np.float32)
    results = [solve(scheduler(name), 5, x, denoiser(), eta=eta) for eta in (0.0, 1.0)]
    assert np.array_equal(*results)


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_states_keep_the_dtype_of_x(name):
    x, family = jnp.ones((2, 3), jnp.float32), scheduler(name)
    row = jax.tree.map(lambda column: column[0], family.table(4))
    solver = SOLVERS[family.solver](0.5)
    found, state = solver.update(x, solver.init(x), x.astype(jnp.bfloat16), None, row, jnp.ones)
    assert {leaf.dtype for leaf in jax.tree.leaves((found, state))} == {jnp.dtype("float32")}


def test_predicted_variance():
    """-1 means the smallest variance and 1 the largest (Nichol & Dhariwal 2021, eq. 15)."""
    family = scheduler("DDPM", variance_type="learned_range")
    row = jax.tree.map(lambda column: column[3], family.table(10))
    x = jnp.ones((1, 3), jnp.float32)
    solver = SOLVERS[family.solver]()
    bare, noisy = (
        solver.update(x, solver.init(x), x, jnp.array([[-1.0, 0.0, 1.0]]), row, draw)[0][0]
        for draw in (jnp.zeros, jnp.ones)
    )
    low, high = np.exp(row.solver.log_variance / 2)
    np.testing.assert_allclose(noisy - bare, [low, np.sqrt(low * high), high], rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_sampler_of_deepfloyd_if():
    """Each call follows Ho et al. 2020, eq. 7, between listed timesteps, with a thresholded x0 and the predicted
    variance."""
    family = from_config(
        {
            "_class_name": "DDPMScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "variance_type": "learned_range",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.95,
            "sample_max_value": 1.5,
        }
    )
    table, bars = family.table("super27"), cumulative(family.options)
    timesteps = table.timestep.astype(int)
    draw, solver = np.random.default_rng(0), SOLVERS[family.solver]()
    expected = x = draw.standard_normal((2, 4, 4, 3))
    for i, (t, after) in enumerate(zip(timesteps, [*timesteps[1:], None], strict=True)):
        # The predictions are close to the noise in x, so that x0 stays near [-1, 1].
        epsilon = expected / np.sqrt(1 - bars[t]) + 0.5 * np.sqrt(bars[t]) * draw.standard_normal(x.shape)
        share, fresh = draw.uniform(-1.2, 1.2, x.shape), draw.standard_normal(x.shape)
        row = jax.tree.map(lambda column, i=i: column[i], table)
        x, _ = solver.update(jnp.asarray(x), solver.init(x), epsilon, share, row, lambda _, fresh=fresh: fresh)

        now, end = bars[t], 1.0 if after is None else bars[after]
        x0 = (expected - np.sqrt(1 - now) * epsilon) / np.sqrt(now)
        s = np.clip(np.quantile(abs(x0), 0.95, (1, 2, 3), keepdims=True), 1, 1.5)
        x0 = np.clip(x0, -s, s) / s
        beta = 1 - now / end
        mean = (np.sqrt(end) * beta * x0 + np.sqrt(now / end) * (1 - end) * expected) / (1 - now)
        w, least = (share + 1) / 2, max((1 - end) / (1 - now) * beta, 1e-20)
        expected = mean + (t > 0) * np.exp((w * np.log(beta) + (1 - w) * np.log(least)) / 2) * fresh
        np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), [("DDPM", {}), ("DPM, stochastic", {"variance_type": "learned_range"})])
def test_predicted_variance_without_effect(name, options):
    """A predicted variance has no effect if the config fixes the variance or if the solver cannot use it."""
    family = scheduler(name, **options)
    row, x, solver = jax.tree.map(lambda column: column[3], family.table(10)), jnp.ones((1, 3)), SOLVERS["multistep"]()
    with_variance, without = (
        solver.update(x, solver.init(x), x, aux, row, jnp.ones)[0] for aux in (jnp.array([[-1.0, 0.5, 1.0]]), None)
    )
    assert np.array_equal(with_variance, without)
