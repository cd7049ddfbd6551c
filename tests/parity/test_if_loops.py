"""Tests the torch loops in `if_loops.py`, which other tests use as references.

Without edits, the loops must equal diffusers' pipelines. With edits, the guidance must equal the NumPy oracle's for the
same predictions.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import functools
import sys
from unittest import mock

import diffusers
import numpy as np
import torch
from reference import oracle
from support import tiny

from parity import if_loops
from parity.if_loops import Text, tensor
from parity.theirs import inject, last, noise, pair, scheduler
from sega_jax import Edit
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL

pytestmark = pytest.mark.parity

COSINE = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
DDPM = COSINE | {"variance_type": "learned_range", "thresholding": True, "dynamic_thresholding_ratio": 0.95}
FIRST, SECOND = DDPM | {"sample_max_value": 1.5}, DDPM | {"sample_max_value": 1.0}
DDIM = tiny.DDIM | {"prediction_type": "v_prediction"}
LINEAR = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear"}
STEPS = 6


@functools.cache
def unet(name):
    config = {"1": tiny.IF_1, "2": tiny.IF_2, "x4": tiny.UPSCALER}[name]
    return pair(UNet2DConditionModel(UNetConfig.from_dict(config)), diffusers.UNet2DConditionModel(**config))[1]


@functools.cache
def vae():
    return pair(AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE)), diffusers.AutoencoderKL(**tiny.VAE))[1]


def text(channels):
    return Text(noise(2, 5, channels, seed=1), noise(2, 5, channels, seed=2))


def noises(count, *shape):
    return [noise(2, *shape, seed=10 + i) for i in range(count)]


START = {"1": noise(2, 8, 8, 3), "2": noise(2, 16, 24, 3), "x4": noise(2, 8, 8, 4)}
PICTURE = np.clip(0.5 * noise(2, 8, 8, 3, seed=3), -1, 1)
SMALL = {
    "2": {
        "picture": PICTURE[:, :4, :6],
        "noising": COSINE,
        "level": 250,
        "level_noises": [noise(2, 16, 24, 3, seed=4)],
    },
    "x4": {"picture": PICTURE, "noising": LINEAR, "level": 7, "level_noise": noise(2, 8, 8, 3, seed=4)},
}
RUNS = {
    "1": lambda **guided: if_loops.first_stage(unet("1"), FIRST, text(24), START["1"], noises(9, 8, 8, 3), **guided),
    "2": lambda small=SMALL["2"], **guided: if_loops.second_stage(
        unet("2"), SECOND, text(24), START["2"], noises(9, 16, 24, 3), **small, **guided
    ),
    "x4": lambda **guided: if_loops.upscaler(unet("x4"), DDIM, text(16), START["x4"], None, **SMALL["x4"], **guided),
}


def theirs(pipe, drawn, text, **call):
    """Runs one of diffusers' pipelines with `drawn` as its noise; returns the result and the states of all calls."""
    pipe.set_progress_bar_config(disable=True)
    states = []
    with mock.patch.object(sys.modules[type(pipe).__module__], "randn_tensor", side_effect=list(map(tensor, drawn))):
        out = pipe(
            prompt_embeds=torch.tensor(text.cond),
            negative_prompt_embeds=torch.tensor(text.uncond),
            callback=lambda _step, _t, x: states.append(last(x)),
            **call,
        )
    return last(out.images), np.stack(states, 1)


def pipeline(cls, name, config, **parts):
    solver = scheduler(config)
    if name != "x4":
        inject(solver, noises(9, *START[name].shape[1:]).__getitem__)
        parts |= {"feature_extractor": None, "requires_safety_checker": False}
    parts |= dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "watermarker"))
    return cls(unet=unet(name), scheduler=solver, **parts)


@pytest.mark.parametrize("steps", [STEPS, [999, 700, 699, 30, 0]], ids=["a number", "a list"])
def test_the_first_stage(steps):
    pipe = pipeline(diffusers.IFPipeline, "1", FIRST)
    call = {"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": steps}
    expected, states = theirs(pipe, [START["1"]], text(24), guidance_scale=7.0, output_type="pt", **call)
    run = RUNS["1"](steps=steps, guidance_scale=7.0)
    np.testing.assert_array_equal(run.x, expected)
    np.testing.assert_array_equal(run.states, states)


def test_the_second_stage():
    pipe = pipeline(diffusers.IFSuperResolutionPipeline, "2", SECOND, image_noising_scheduler=scheduler(COSINE))
    expected, states = theirs(
        pipe,
        [START["2"], *SMALL["2"]["level_noises"]],
        text(24),
        image=tensor(SMALL["2"]["picture"]),
        height=16,
        width=24,
        noise_level=250,
        guidance_scale=4.0,
        num_inference_steps=STEPS,
        output_type="pt",
    )
    run = RUNS["2"](steps=STEPS, guidance_scale=4.0)
    np.testing.assert_array_equal(run.x, expected)
    np.testing.assert_array_equal(run.states, states)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_upscaler():
    parts = {"vae": vae(), "low_res_scheduler": scheduler(LINEAR), "max_noise_level": 350}
    pipe = pipeline(diffusers.StableDiffusionUpscalePipeline, "x4", DDIM, **parts)
    call = {"guidance_scale": 9.0, "num_inference_steps": STEPS, "noise_level": 7, "latents": tensor(START["x4"])}
    call |= {"image": tensor(PICTURE)}
    run = RUNS["x4"](steps=STEPS, guidance_scale=9.0)
    expected, states = theirs(pipe, [SMALL["x4"]["level_noise"]], text(16), output_type="latent", **call)
    np.testing.assert_array_equal(run.x, expected)
    np.testing.assert_array_equal(run.states, states)
    expected, _ = theirs(pipe, [SMALL["x4"]["level_noise"]], text(16), output_type="pt", **call)
    np.testing.assert_array_equal(np.clip(if_loops.decoded(vae(), run.x) / 2 + 0.5, 0, 1), expected)


def test_new_noise_at_every_call_of_the_second_stage():
    (once,) = SMALL["2"]["level_noises"]
    one, same, fresh = (
        RUNS["2"](SMALL["2"] | {"level_noises": drawn}, steps=3, guidance_scale=4.0)
        for drawn in ([once], [once] * 3, [once, *noises(2, 16, 24, 3)])
    )
    np.testing.assert_array_equal(one.states, same.states)
    np.testing.assert_array_equal(one.states[:, 0], fresh.states[:, 0])
    assert np.abs(one.states[:, 1] - fresh.states[:, 1]).max() > 1e-3


def edits(channels):
    concepts = noise(3, 5, channels, seed=7)
    return {
        "now": [Edit(concepts[0], 4, 0.8, 0)],
        "one": [Edit(concepts[0], 4, 0.8, 2)],
        "three": [
            Edit(concepts[0], 4, 0.9, 0, 4),
            Edit(concepts[1], -5.5, 0.5, 2, 5, 2.0),
            Edit(concepts[2], 6, 0.95, 3, None, 0.5),
        ],
        "three, one of them never warm": [
            Edit(concepts[0], 4, 0.9, 1, 2), Edit(concepts[1], 5, 0, 2), Edit(concepts[2], 6, 1, 99)
        ],
        "one cools down before the other is warm": [Edit(concepts[0], 4, 0.9, 0, 2), Edit(concepts[1], 5, 0.5, 4)],
    }  # fmt: skip


@pytest.mark.parametrize("case", edits(1))
@pytest.mark.parametrize("name", RUNS)
def test_edits(name, case):
    """The guidance equals the oracle's for the same predictions. Before the guidance starts, states equal those without
    edits."""
    chosen = edits(16 if name == "x4" else 24)[case]
    run = RUNS[name](steps=STEPS, guidance_scale=5.0, edits=chosen, momentum=(0.3, 0.6))
    plain = RUNS[name](steps=STEPS, guidance_scale=5.0)
    assert run.edits.shape == (2, STEPS, len(chosen), *START[name].shape[1:])
    assert (run.variance is None) == (name == "x4")
    settings = {
        field: [getattr(edit, field) for edit in chosen] for field in ("threshold", "warmup", "cooldown", "weight")
    }
    for row in range(2):
        expected = oracle.guidance(
            run.uncond[row].astype(np.float64),
            run.edits[row].astype(np.float64),
            scale=[abs(edit.scale) for edit in chosen],
            reverse=[edit.scale < 0 for edit in chosen],
            momentum_scale=[0.3],
            momentum_beta=[0.6],
            semantics="diffusers",
            **settings,
        )
        assert np.linalg.norm(run.sem_guidance[row] - expected) < 1e-5 * np.linalg.norm(expected)
    begins = min(edit.warmup for edit in chosen)
    np.testing.assert_allclose(run.states[:, :begins], plain.states[:, :begins], atol=1e-4)
    assert np.abs(run.x - plain.x).max() > 1e-2
    assert not plain.sem_guidance.any()


def test_the_step_takes_the_variance_of_the_prompt():
    """The equations of a DDPM step, applied to an edited call's predictions and noise, give the recorded state."""
    run = RUNS["1"](steps=[500, 100], guidance_scale=5.0, edits=edits(24)["now"])
    solver = scheduler(FIRST)
    assert run.sem_guidance[:, 0].any()
    a, b = (float(solver.alphas_cumprod[t]) for t in (500, 100))
    estimate = run.uncond + 5 * (run.cond - run.uncond) + run.sem_guidance
    x0 = (START["1"] - (1 - a) ** 0.5 * estimate[:, 0]) / a**0.5
    bound = np.clip(np.quantile(np.abs(x0).reshape(2, -1), 0.95, axis=1), 1, 1.5)[:, None, None, None]
    x0 = np.clip(x0, -bound, bound) / bound
    alpha, least = a / b, (1 - b) / (1 - a)
    mean = b**0.5 * (1 - alpha) / (1 - a) * x0 + alpha**0.5 * least * START["1"]
    share = (run.variance[:, 0] + 1) / 2
    log_variance = share * np.log(1 - alpha) + (1 - share) * np.log(least * (1 - alpha))
    expected = mean + np.exp(0.5 * log_variance) * noises(1, 8, 8, 3)[0]
    np.testing.assert_allclose(run.states[:, 0], expected, atol=1e-4)
