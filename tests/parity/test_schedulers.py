"""Compares every scheduler with its counterpart in diffusers: timesteps, and complete float64 trajectories for fixed
network outputs."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import importlib
import itertools
import json
from functools import partial
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.pipelines import deepfloyd_if

from parity.theirs import double, noise, relative, scheduler
from sega_jax.method.schedules import FAMILIES, from_config
from sega_jax.method.schedules.spacing import NAMED, cumulative
from sega_jax.method.solvers import SOLVERS
from sega_jax.pipelines.components import as_scheduler

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

# The tolerance for the relative L2 error of each state of a trajectory.
TRAJECTORY = 1e-9
SHAPE = (2, 3, 2)  # pictures, channels, positions
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# The scheduler of DeepFloyd-IF's stage I.
IF = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def product(**options):
    """Returns every combination of the options' values."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


# Dynamic thresholds below 1, between 1 and `sample_max_value`, and above it.
THRESHOLDS = product(thresholding=[True], dynamic_thresholding_ratio=[0.3, 0.95], sample_max_value=[1.0, 1.5, 9.0])


def respaced(*options):
    return [{}, *({option: True} for option in options or RESPACED)]


# The options that change each scheduler's coefficients, except options that all schedulers share.
VARIANTS = {
    "DDIMScheduler": [
        *product(clip_sample=[True, False], set_alpha_to_one=[True, False], rescale_betas_zero_snr=[True, False]),
        *THRESHOLDS,
    ],
    "PNDMScheduler": product(skip_prk_steps=[True, False], set_alpha_to_one=[True, False]),
    "DDPMScheduler": [
        *product(
            variance_type=["fixed_small", "fixed_small_log", "fixed_large"],
            clip_sample=[True, False],
            rescale_betas_zero_snr=[True, False],
        ),
        *THRESHOLDS,
    ],
    "EulerDiscreteScheduler": [
        *respaced(),
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous"},
        {"final_sigmas_type": "sigma_min"},
        {"rescale_betas_zero_snr": True},
    ],
    "EulerAncestralDiscreteScheduler": [{}, {"rescale_betas_zero_snr": True}],
    "HeunDiscreteScheduler": [*respaced(), {"clip_sample": True, "clip_sample_range": 0.8}],
    "LMSDiscreteScheduler": respaced(),
    "DPMSolverMultistepScheduler": [
        *product(
            solver_order=[1, 2, 3],
            solver_type=["midpoint", "heun"],
            algorithm_type=["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"],
            use_karras_sigmas=[True, False],
            final_sigmas_type=["zero", "sigma_min"],
            euler_at_final=[True, False],
            lower_order_final=[True, False],
        ),
        *respaced("use_exponential_sigmas", "use_beta_sigmas"),
        {"rescale_betas_zero_snr": True},
        *THRESHOLDS,
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
    ],
    "UniPCMultistepScheduler": [
        *product(
            solver_order=[1, 2, 3],
            solver_type=["bh1", "bh2"],
            predict_x0=[True, False],
            lower_order_final=[True, False],
            final_sigmas_type=["zero", "sigma_min"],
            disable_corrector=[[], [0, 1, 2]],
        ),
        *product(use_karras_sigmas=[True], final_sigmas_type=["zero", "sigma_min"], sigma_max=[None, 9.0]),
        *respaced("use_exponential_sigmas", "use_beta_sigmas"),
        *THRESHOLDS,
        {"rescale_betas_zero_snr": True},
    ],
    "KDPM2DiscreteScheduler": respaced("use_karras_sigmas"),
    "KDPM2AncestralDiscreteScheduler": respaced("use_karras_sigmas"),
    "DPMSolverSinglestepScheduler": [
        *product(
            solver_order=[1, 2, 3],
            solver_type=["midpoint", "heun"],
            algorithm_type=["dpmsolver++", "dpmsolver", "sde-dpmsolver++"],
            final_sigmas_type=["sigma_min"],
        ),
        *product(solver_order=[2, 3], final_sigmas_type=["zero", "sigma_min"], lower_order_final=[True, False]),
        *product(use_karras_sigmas=[True], final_sigmas_type=["zero", "sigma_min"]),
        *respaced("use_exponential_sigmas", "use_beta_sigmas"),
        THRESHOLDS[1],
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
    ],
    "DEISMultistepScheduler": [
        *product(solver_order=[1, 2, 3], lower_order_final=[True, False], use_karras_sigmas=[True, False]),
        *respaced("use_exponential_sigmas", "use_beta_sigmas"),
    ],
    "LCMScheduler": [
        *product(clip_sample=[True, False], rescale_betas_zero_snr=[True, False], original_inference_steps=[50, 30]),
        {"timestep_scaling": 0.01},
        THRESHOLDS[1],
    ],
    "TCDScheduler": product(
        clip_sample=[True, False], rescale_betas_zero_snr=[True, False], original_inference_steps=[50, 30]
    ),
    "EDMEulerScheduler": [
        *product(sigma_schedule=["karras", "exponential"], final_sigmas_type=["zero", "sigma_min"]),
        {"sigma_max": 9.0, "sigma_min": 0.1, "rho": 3.0, "sigma_data": 1.0},
    ],
    "EDMDPMSolverMultistepScheduler": [
        *product(
            solver_order=[1, 2, 3],
            solver_type=["midpoint", "heun"],
            algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
        ),
        *product(solver_order=[3], sigma_schedule=["karras", "exponential"], lower_order_final=[True, False]),
        # diffusers divides 0 by 0 if the last step has a higher order.
        {"final_sigmas_type": "sigma_min", "sigma_min": 0.1, "sigma_max": 9.0, "rho": 3.0, "euler_at_final": True},
        THRESHOLDS[1],
    ],
    "IPNDMScheduler": [{}],
}
# Combinations that diffusers does not support, or for which diffusers' results are not finite.
MISSING = {
    ("EulerAncestralDiscreteScheduler", "sample"),
    ("PNDMScheduler", "sample"),
    ("KDPM2DiscreteScheduler", "sample"),
    ("KDPM2AncestralDiscreteScheduler", "sample"),
    ("EDMEulerScheduler", "sample"),
    ("EDMDPMSolverMultistepScheduler", "sample"),
    ("IPNDMScheduler", "sample"),
    ("IPNDMScheduler", "v_prediction"),
}
WITH_BETAS = [name for name, family in FAMILIES.items() if family.training == "betas"]
DISTILLED = ["LCMScheduler", "TCDScheduler"]


@partial(jax.jit, static_argnames="solver")
def update(solver, eta, x, state, output, row, drawn):
    """Updates x. The network's output may contain the predicted variance as additional channels."""
    output, aux = (output, None) if output.shape == x.shape else jnp.split(output, 2, 1)
    return SOLVERS[solver](eta).update(x, state, output, aux, row, lambda shape: drawn)


def ours(config, steps, x, outputs, eta, drawn):
    family = from_config(config)
    table = family.table(steps)
    state, trajectory = SOLVERS[family.solver](eta).init(x), []
    for i in range(len(table.call)):
        row = jax.tree.map(lambda column, i=i: column[i], table)
        x, state = update(family.solver, eta, x, state, outputs[i], row, drawn[i])
        trajectory.append(x)
    return table, trajectory


def theirs(config, steps, x, outputs, eta, drawn):
    twin = scheduler(config)
    twin.set_timesteps(**{"num_inference_steps" if isinstance(steps, int) else "timesteps": steps})
    module, extra = importlib.import_module(type(twin).__module__), {}
    if config["_class_name"] in ("DDIMScheduler", "TCDScheduler"):
        extra = {"eta": eta}
    x, scales, trajectory = torch.tensor(x), [], []
    for i, t in enumerate(twin.timesteps):
        scales.append(float(twin.scale_model_input(torch.ones(()), t)))
        with mock.patch.object(module, "randn_tensor", create=True, return_value=torch.tensor(drawn[i])):
            x = twin.step(torch.tensor(outputs[i]), t, x, **extra).prev_sample
        trajectory.append(x)
    return twin, scales, trajectory


def compare(config, steps, eta=0.0):
    """Compares tables and trajectories; `steps` is the number of steps or their timesteps."""
    with double():
        count = steps if isinstance(steps, int) else len(steps)
        calls, (batch, channels, *space) = 2 * count + 12, SHAPE
        learned = config.get("variance_type") == "learned_range"
        x, drawn = noise(*SHAPE), noise(calls, *SHAPE, seed=2)
        outputs = noise(calls, batch, channels * (2 if learned else 1), *space, seed=1)
        twin, scales, expected = theirs(config, steps, x, outputs, eta, drawn)
        table, trajectory = ours(config, steps, x, outputs, eta, drawn)
        if not expected[-1].isfinite().all():
            # In the last step of "bh1", diffusers multiplies infinity by 0, where the correct term is 0.
            assert config["solver_type"] == "bh1"
            assert np.isfinite(trajectory.pop()).all()
            expected.pop()
        np.testing.assert_allclose(table.timestep, twin.timesteps, rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(table.input_scale, scales, rtol=1e-9)
        np.testing.assert_allclose(table.initial_scale, float(twin.init_noise_sigma), rtol=1e-9)
        assert len(trajectory) == len(expected)
        assert max(relative(*both) for both in zip(trajectory, expected, strict=True)) < TRAJECTORY


def refusal(name, variant):
    """Returns the error message if the library refuses the given options, or None if it accepts them."""
    try:
        from_config({"_class_name": name} | variant)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_catalogue(name, prediction, steps):
    if (name, prediction) in MISSING:
        pytest.skip("not in diffusers")
    for variant in VARIANTS[name]:
        config = {"_class_name": name, "prediction_type": prediction} | SD | variant
        if (why := refusal(name, variant)) is not None:
            assert "solver_order" in why or "zero" in why
            continue
        if name in DISTILLED and variant.get("rescale_betas_zero_snr") and prediction == "epsilon":
            continue  # the first timestep has no signal
        compare(config | {"timestep_spacing": "leading"}, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 49])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_spacings(name, spacing, steps):
    if (name, steps) == ("IPNDMScheduler", 1):
        pytest.skip("diffusers returns zeros")
    compare({"_class_name": name, "skip_prk_steps": True, "timestep_spacing": spacing} | SD, steps, eta=0.5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_zero_signal_to_noise(name, spacing):
    if "rescale_betas_zero_snr" in FAMILIES[name].defaults:
        options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": spacing}
        compare({"_class_name": name} | SD | options, 10)


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
@pytest.mark.parametrize("name", WITH_BETAS)
def test_betas(name, betas):
    compare({"_class_name": name, "skip_prk_steps": True} | betas, 10, eta=0.3)


@pytest.mark.parametrize("name", WITH_BETAS)
def test_a_first_beta_of_zero(name):
    """Our states equal diffusers' as long as diffusers' are finite, and ours stay finite after that."""
    for spacing, prediction in (("leading", "epsilon"), ("linspace", "v_prediction")):
        config = {"_class_name": name, "skip_prk_steps": True, "timestep_spacing": spacing}
        config |= {"prediction_type": prediction, "beta_start": 0, "beta_end": 0.02}
        with double():
            x, outputs, drawn = noise(*SHAPE), noise(32, *SHAPE, seed=1), noise(32, *SHAPE, seed=2)
            _, _, expected = theirs(config, 10, x, outputs, 0.3, drawn)
            _, trajectory = ours(config, 10, x, outputs, 0.3, drawn)
            assert np.isfinite(np.stack(trajectory)).all()
            finite_states = [bool(state.isfinite().all()) for state in expected]
            assert finite_states[0]
            for mine, state, finite in zip(trajectory, expected, finite_states, strict=True):
                assert not finite or relative(mine, state) < TRAJECTORY


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_timesteps_of_many_numbers_of_steps(name, spacing, offset):
    """Timesteps equal diffusers', except that diffusers appends a -1 in some cases, such as 61 trailing steps."""
    config = {"_class_name": name, "skip_prk_steps": True, "timestep_spacing": spacing, "steps_offset": offset}
    expected = scheduler(config)
    every = 1 if name in ("DDIMScheduler", "PNDMScheduler") else 37
    numbers = [*range(1, 998, every), 61, 103]
    if name in DISTILLED:
        numbers = range(1, 51)
    elif any(part in name for part in ("KDPM2", "DEIS", "LMS")) or name not in WITH_BETAS:
        # Their tables take long to compute.
        numbers = [2, 7, 38, 250]
    for steps in numbers:
        expected.set_timesteps(steps)
        timesteps = from_config(config).table(steps).timestep
        their_timesteps = [t for t in expected.timesteps.tolist() if t > -1 or name not in WITH_BETAS]
        # diffusers interpolates between the training timesteps, using float32 logarithms of sigma.
        np.testing.assert_allclose(timesteps, their_timesteps, rtol=1e-6, atol=3e-3 if "KDPM2" in name else 1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.05, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_share_of_fresh_noise(steps, eta):
    """The timestep that a TCD step goes to before it adds noise is rounded down, as in diffusers."""
    for options in (SD, SD | {"prediction_type": "v_prediction", "original_inference_steps": 333}):
        compare({"_class_name": "TCDScheduler"} | options, steps, eta)


@pytest.mark.parametrize("name", DISTILLED)
def test_given_timesteps_of_distilled_networks(name):
    for timesteps in ([999], [999, 749, 499, 249], [801, 401, 1]):
        compare({"_class_name": name} | SD, timesteps, 0.3)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "DDPMScheduler"])
def test_all_training_steps(name):
    compare({"_class_name": name, "skip_prk_steps": True} | SD | {"steps_offset": 0}, 1000)


@pytest.mark.parametrize("options", [SD | {"variance_type": "learned_range"}, IF], ids=["bare", "DeepFloyd-IF"])
@pytest.mark.parametrize("steps", [1, 4, 50, 100])
def test_learned_variance(options, steps):
    """The network's output interpolates between the smallest and the largest variance."""
    compare({"_class_name": "DDPMScheduler"} | options, steps)


@pytest.mark.parametrize("name", NAMED)
def test_named_timesteps(name):
    expected = getattr(deepfloyd_if.timesteps, f"{name}_timesteps")
    config = {"_class_name": "DDPMScheduler"} | IF
    assert from_config(config).table(name).timestep.tolist() == expected
    compare(config, expected)


@pytest.mark.parametrize("timesteps", [[999], [7], [998, 500, 499, 3], [*range(981, 0, -61)]])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_given_timesteps(name, prediction, timesteps):
    """The tested classes are those that accept timesteps in diffusers."""
    for betas in (SD, {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}):
        compare({"_class_name": name, "prediction_type": prediction} | betas, timesteps)


@pytest.mark.parametrize("betas", [SD, IF, {}], ids=["Stable Diffusion", "DeepFloyd-IF", "linear"])
def test_products_of_alphas(betas):
    config = {"_class_name": "DDPMScheduler"} | betas
    with double():
        np.testing.assert_allclose(cumulative(from_config(config).options), scheduler(config).alphas_cumprod, rtol=1e-9)


# KDPM2's classes are slow to construct, so only some pairs contain them.
EXCHANGED = [
    pair
    for pair in itertools.product(FAMILIES, FAMILIES)
    if not any("KDPM2" in name for name in pair) or pair[0] in ("DDIMScheduler", "LCMScheduler")
]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(("source", "target"), EXCHANGED)
def test_exchange(source, target, saved):
    """Changing the class of a scheduler object or of a saved config keeps the options that diffusers keeps."""
    betas = {key: SD[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    before = getattr(diffusers, source)(**betas if source in WITH_BETAS else {})
    config = json.loads(before.to_json_string()) if saved else before
    if FAMILIES[source].training != FAMILIES[target].training:
        with pytest.raises(ValueError, match=f"{target} samples networks trained"):
            as_scheduler(target, as_scheduler(config).config)
        return
    if saved and (source, target) == ("DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"):
        return  # UniPC refuses configs that do not lower the order at the end
    if saved and source == "DEISMultistepScheduler" and target.startswith("DPMSolver"):
        return  # diffusers rejects the algorithm's name in a saved config
    options = as_scheduler(target, as_scheduler(config).config).options
    expected = getattr(diffusers, target).from_config(json.loads(before.to_json_string()) if saved else before.config)
    for key, value in options.items():
        # A saved config of another class may contain null, which means the default.
        default_or_value = FAMILIES[target].defaults[key] if expected.config[key] is None else expected.config[key]
        assert value == (tuple(default_or_value) if isinstance(value, tuple) else default_or_value), key


RESPACING = [name for name, family in FAMILIES.items() if "use_karras_sigmas" in family.defaults]


@pytest.mark.parametrize("target", [name for name in RESPACING if "KDPM2" not in name])
def test_smallest_and_largest_sigma_of_another_class(target):
    """diffusers' classes read both sigmas from another class's config, even if they have no such options themselves."""
    ends = {"sigma_min": 0.01, "sigma_max": 9.0, "use_karras_sigmas": True}
    source = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", **ends)
    expected = getattr(diffusers, target).from_config(source.config)
    expected.set_timesteps(5)
    ours = as_scheduler(target, as_scheduler(source).config)
    np.testing.assert_allclose(ours.table(5).timestep, expected.timesteps.numpy(), atol=0.01)  # theirs are float32
    assert expected.timesteps[0] < 950 or target == "LMSDiscreteScheduler"  # its Karras spacing ignores both


def test_an_alias_is_replaced_in_the_config():
    source = diffusers.UniPCMultistepScheduler(solver_type="heun")
    expected = diffusers.DPMSolverMultistepScheduler.from_config(source.config)
    ours = as_scheduler({"_class_name": "UniPCMultistepScheduler", "solver_type": "heun"})
    assert ours.config.solver_type == source.config.solver_type == "bh2"
    converted = as_scheduler("DPMSolverMultistepScheduler", ours.config)
    assert converted.options["solver_type"] == expected.config.solver_type
