"""Compares calls that start from pictures with diffusers' `StableDiffusionImg2ImgPipeline`, using the same noise.

The tests compare the latents after every call, and the pictures. That pipeline has no edits, so the reference with
edits is diffusers' semantic pipeline, started from the noised picture at the same timestep.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import functools

import diffusers
import jax
import numpy as np
import torch
from PIL import Image
from support import tiny

from parity import theirs
from parity.theirs import double, first, fresh, inject, last, noise, precision, relative, schedule
from sega_jax.systems.programs import POSTERIOR

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:the edit .* begins at:UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SEED, STEPS, SHAPE = 7, 10, (8, 8, 4)
CALL = {"prompt": ["a cat", "dog"], "negative_prompt": ["", "bad"], "num_inference_steps": STEPS, "guidance_scale": 5.0}
PICTURES = np.random.default_rng(3).random((2, 16, 16, 3)).astype(np.float32)
V = {"prediction_type": "v_prediction"}
# {name: (scheduler, strengths)}
CASES = {
    **{name: (config, (0.8, 0.55)) for name, config in tiny.SCHEDULERS.items() if name != "PNDM, Runge-Kutta"},
    **{name: (tiny.FURTHER[name], (0.55,)) for name in ("KDPM2 ancestral", "LCM")},
    "DPM, single-step of order 3": (tiny.FURTHER["DPM, single-step"] | {"solver_order": 3}, (0.4,)),
    "DDIM, at the ends": (tiny.DDIM, (1.0, 0.1)),
    "DDIM, v, trailing": (tiny.DDIM | V | {"timestep_spacing": "trailing"}, (0.6,)),
    "PNDM, at the ends": (tiny.PNDM, (1.0, 0.9, 0.3, 0.1)),
    "PNDM, Runge-Kutta": (tiny.SCHEDULERS["PNDM, Runge-Kutta"], (1.0,)),
    "Euler, strength 1": (tiny.SCHEDULERS["Euler"], (1.0,)),
    "Heun, Karras sigmas": (tiny.SCHEDULERS["Heun"] | {"use_karras_sigmas": True}, (0.4,)),
    "LMS, few": (tiny.SCHEDULERS["LMS"], (0.2,)),
    "DPM, order 3": (tiny.SCHEDULERS["DPM"] | {"solver_order": 3}, (0.7, 0.1)),
    "UniPC, order 3, leading": (tiny.SCHEDULERS["UniPC"] | {"solver_order": 3, "timestep_spacing": "leading"}, (0.5,)),
}
IN_DOUBLE = ["DDIM", "PNDM", "Heun", "LMS", "DPM, order 3", "UniPC"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", unet=tiny.UNET_1)


@pytest.fixture(scope="module")
def both(folder, one_device):
    """Returns a function that loads our semantic pipeline, and diffusers' img2img and semantic pipelines."""

    def load(dtype="float32"):
        ours, semantic = theirs.load(folder, dtype, one_device)
        parts = semantic.components | {"image_encoder": None}
        reference = diffusers.StableDiffusionImg2ImgPipeline(**parts)
        reference.set_progress_bar_config(disable=True)
        return ours, reference, semantic

    return functools.cache(load)


def check(both, config, strength, end):
    ours, reference, _ = both
    latents, seen, expected = noise(2, *SHAPE), [], []
    pictures = PICTURES.astype(precision())
    schedule(ours, reference, config)
    inject(reference.scheduler, fresh(range(SEED, SEED + 2), SHAPE))
    mine = {"latents": latents, "seed": SEED, "callback": lambda *step: seen.append(step)}
    a = ours(**CALL, image=pictures, strength=strength, output_type="np", **mine)

    def keep(pipe, i, t, values):
        expected.append((t, values["latents"]))
        return values

    with theirs.start(type(reference), range(SEED, SEED + 2), latents):
        b = reference(**CALL, image=first(pictures), strength=strength, output_type="np", callback_on_step_end=keep)
    np.testing.assert_allclose([t for _, t, _ in seen], [float(t) for t, _ in expected], rtol=1e-5, atol=1e-4)
    assert max(relative(x, last(y)) for (*_, x), (_, y) in zip(seen, expected, strict=True)) < end
    assert (np.abs(a.images - b.images) > 2e-3).mean() <= 1e-3


@pytest.mark.parametrize(("name", "strength"), [(name, s) for name, (_, several) in CASES.items() for s in several])
def test_case(name, strength, both):
    check(both(), CASES[name][0], strength, end=3e-4)


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_case_in_float64(name, both):
    pipelines = both("float64")
    with double():
        check(pipelines, CASES[name][0], 0.6, end=1e-9)


def test_one_pil_picture_for_all_rows(both):
    """Our pipeline repeats a single picture for all rows, whereas diffusers needs one for each row."""
    ours, reference, _ = both()
    latents = noise(2, *SHAPE)
    picture = Image.fromarray((PICTURES[0] * 255).astype(np.uint8))
    schedule(ours, reference, tiny.DDIM)
    a = ours(**CALL, image=picture, latents=latents, seed=SEED, output_type="np")
    with theirs.start(type(reference), range(SEED, SEED + 2), latents):
        b = reference(**CALL, image=[picture] * 2, output_type="np")
    assert (np.abs(a.images - b.images) > 2e-3).mean() <= 1e-3


def test_edits(both):
    """Warm-ups and cool-downs count only the calls that are run."""
    ours, _, semantic = both()
    latents, seen, expected, begin = noise(2, *SHAPE), [], [], 4
    schedule(ours, semantic, tiny.DDIM)
    set_timesteps = semantic.scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def later(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        semantic.scheduler.timesteps = semantic.scheduler.timesteps[begin:]

    semantic.scheduler.set_timesteps = later
    call = CALL | {
        "editing_prompt": ["glasses", "b"],
        "edit_warmup_steps": [0, 2],
        "edit_cooldown_steps": [4, 6],
        "edit_threshold": [0.9, 0.5],
        "reverse_editing_direction": [False, True],
        "edit_momentum_scale": 0.3,
        "output_type": "np",
    }
    shares = {"image": PICTURES, "strength": 0.6, "seed": SEED}
    a = ours(**call, **shares, latents=latents, callback=lambda *step: seen.append(step), return_guidance=True)
    keys = [jax.random.key(seed) for seed in range(SEED, SEED + 2)]
    z = np.stack([jax.random.normal(jax.random.fold_in(key, POSTERIOR), SHAPE, np.float32) for key in keys])
    with torch.no_grad():
        posterior = semantic.vae.encode(first(PICTURES) * 2 - 1).latent_dist
        clean = (posterior.mean + posterior.std * first(z)) * semantic.vae.config.scaling_factor
        timestep = torch.tensor([1 + 1000 // STEPS * (STEPS - 1 - begin)] * 2)
        x = semantic.scheduler.add_noise(clean, first(latents), timestep)
        b = semantic(**call, latents=x, callback=lambda *step: expected.append(step))
    assert len(seen) == STEPS - begin
    assert max(relative(x, last(y)) for (*_, x), (*_, y) in zip(seen, expected, strict=True)) < 3e-4
    assert (np.abs(a.images - b.images) > 2e-3).mean() <= 1e-3
    assert relative(a.sem_guidance, last(semantic.sem_guidance)[: len(seen)]) < 3e-4
