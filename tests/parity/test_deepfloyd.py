"""Compares DeepFloyd-IF's stages and the x4 upscaler with diffusers' pipelines, which have no semantic guidance.

Both libraries use the same initial and fresh noise, and add the same noise to the small picture. The tests compare the
states after every call, and the pictures.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import functools
import sys
from unittest import mock

import diffusers
import jax
import numpy as np
import torch
from support import tiny

import sega_jax
from parity.theirs import double, first, fresh, inject, last, precision, relative, scheduler
from sega_jax.method.arguments import arguments
from sega_jax.method.schedules import from_config

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

SEEDS = [3, 8]
INITIAL, SMALL = 2**32 - 1, 2**32 - 2
DDPM = tiny.IF_SCHEDULER
V = {"prediction_type": "v_prediction"}
TWO = {"prompt": ["a Cat at", "dog, "], "negative_prompt": ["bad", ""]}
PICTURES = np.random.default_rng(1).random((2, 8, 8, 3))
# {name: (pipeline, scheduler, arguments of both calls, arguments of our call only)}
CASES = {
    "stage I": ("1", DDPM, TWO, {"steps": 12}),
    "stage I, strong guidance": ("1", DDPM, TWO | {"guidance_scale": 15.0}, {"steps": 5}),
    "stage I, a named list": ("1", DDPM, TWO, {"steps": "fast27"}),
    "stage I, wide": ("1", DDPM, TWO | {"height": 12, "width": 20}, {"steps": 12}),
    "stage I, variance of the schedule": ("1", DDPM | {"variance_type": "fixed_small"}, TWO, {"steps": 6}),
    "stage I, DPM": ("1", DDPM | {"_class_name": "DPMSolverMultistepScheduler"}, TWO, {"steps": 6}),
    "stage II": ("2", DDPM | {"sample_max_value": 1.0}, TWO | {"noise_level": 250}, {"steps": 10}),
    "stage II, little noise": ("2", DDPM, TWO | {"noise_level": 0, "guidance_scale": 2.0}, {"steps": 4}),
    "stage II, wide": ("2", DDPM, TWO | {"noise_level": 999, "height": 16, "width": 48}, {"steps": 3}),
    "upscaler": ("x4", tiny.DDIM | V, TWO | {"noise_level": 20}, {"steps": 8}),
    "upscaler, much noise": ("x4", tiny.DDIM | V, TWO | {"noise_level": 350, "guidance_scale": 3.0}, {"steps": 4}),
    "upscaler, Euler": ("x4", tiny.SCHEDULERS["Euler"] | V, TWO | {"noise_level": 100}, {"steps": 5}),
}
IN_DOUBLE = [
    "stage I",
    "stage I, strong guidance",
    "stage I, wide",
    "stage I, a named list",
    "stage II",
    "stage II, little noise",
    "stage II, wide",
    "upscaler",
]
DEFAULTS = {"1": {"steps": 100, "guidance_scale": 7.0}, "2": {"steps": 50, "guidance_scale": 4.0, "noise_level": 250}}
DEFAULTS["x4"] = {"steps": 75, "guidance_scale": 9.0, "noise_level": 20}
KINDS = {
    "1": diffusers.IFPipeline,
    "2": diffusers.IFSuperResolutionPipeline,
    "x4": diffusers.StableDiffusionUpscalePipeline,
}


@pytest.fixture(scope="module")
def both(tmp_path_factory, one_device):
    """Returns a function that loads a stage into both our pipeline and diffusers'."""
    folder = tmp_path_factory.mktemp("stages")
    folders = {"1": tiny.stage(folder / "1"), "2": tiny.stage(folder / "2", tiny.STAGE_2)}
    folders["x4"] = tiny.upscaler(folder / "x4")

    @functools.cache
    def load(name, dtype="float32"):
        reference = KINDS[name].from_pretrained(folders[name], **({} if name == "x4" else {"watermarker": None}))
        reference.set_progress_bar_config(disable=True)
        with jax.enable_x64(dtype == "float64"):
            ours = sega_jax.load(folders[name], dtype=dtype, devices=one_device)
        return ours, reference.to(dtype=getattr(torch, dtype))

    return load


def small_noise(shape):
    """Returns the noise that our pipeline draws for the small pictures of rows with `SEEDS`."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SMALL), 0) for seed in SEEDS]
    return np.stack([jax.random.normal(key, shape, precision()) for key in keys])


def size_of(name, ours, call):
    if name == "x4":
        return 8, 8, 4
    return ours.latent_shape(call.get("height"), call.get("width"))


def run(name, ours, reference, config, call, mine):
    """Runs a call in both pipelines; returns our pictures, theirs, and the states of both after every call."""
    seen, expected, shape = [], [], size_of(name, ours, call)
    draw = fresh(SEEDS, shape)
    ours.scheduler, reference.scheduler = from_config(config), scheduler(config)
    if name != "1":
        # Replace the scheduler with a new one, which has the precision that `double` selects.
        part = "image_noising_scheduler" if name == "2" else "low_res_scheduler"
        noising = ours.extras.low_res_noise.scheduler.config | {"_class_name": "DDPMScheduler"}
        setattr(reference, part, scheduler(noising))
    pictures = PICTURES.astype(precision())
    if shape[1] > 32:
        pictures = pictures[:, :4].repeat(2, 2)[:, :, :12]
    inject(reference.scheduler, draw)
    a = ours(
        **call,
        **mine,
        **({} if name == "1" else {"image": pictures}),
        seed=SEEDS,
        output="float",
        callback=lambda *step: seen.append(step[2]),
    )
    steps = {"num_inference_steps": mine["steps"]} if isinstance(mine["steps"], int) else {}
    if not steps:
        steps = {"timesteps": ours.scheduler.table(mine["steps"]).timestep.astype(int).tolist()}
    its = call | steps | ({} if name == "1" else {"image": first(2 * pictures - 1)})
    if name != "x4":
        its["clean_caption"] = False
    # This is the order in which the pipeline draws its noise.
    drawn = [draw(INITIAL)] if name != "x4" else []
    drawn += [] if name == "1" else [small_noise((*shape[:2], 3))]
    if name == "x4":
        its["latents"] = first(draw(INITIAL))
    module = sys.modules[type(reference).__module__]
    with mock.patch.object(module, "randn_tensor", side_effect=[first(noise) for noise in drawn]):
        b = reference(**its, output_type="np", callback=lambda *step: expected.append(step[2]))
    return a.images, b.images, seen, [last(x) for x in expected]


def check(name, ours, reference, end):
    part, config, call, mine = CASES[name]
    call = {"guidance_scale": DEFAULTS[part]["guidance_scale"]} | call
    a, b, seen, expected = run(part, ours, reference, config, call, mine)
    assert len(seen) == len(expected)
    assert max(relative(x, y) for x, y in zip(seen, expected, strict=True)) < end
    assert (np.abs(a - b) > 2e-3).mean() <= 1e-3
    assert a.std() > 0.05


@pytest.mark.parametrize("name", CASES)
def test_case(name, both):
    check(name, *both(CASES[name][0]), end=3e-4)


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_case_in_float64(name, both):
    pipelines = both(CASES[name][0], "float64")
    with double():
        check(name, *pipelines, end=1e-9)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name, both):
    import inspect

    ours, reference = both(name)
    theirs = {key: value.default for key, value in inspect.signature(reference.__call__).parameters.items()}
    defaults = DEFAULTS[name] | {"num_inference_steps": DEFAULTS[name]["steps"]}
    assert defaults.items() >= {key: theirs[key] for key in defaults if key in theirs}.items()
    mine = {key: one.default for key, one in arguments(ours.system.call).items()}
    assert {key: mine[key] for key in ("steps", "guidance_scale", "noise_level") if key in mine} == DEFAULTS[name]


def recording(module, draws):
    """Makes a diffusers module append to `draws` all noise that it draws with torch's generator."""
    randn_tensor = module.randn_tensor

    def draw(*args, **kwargs):
        noise = randn_tensor(*args, **kwargs)
        draws.append(last(noise))
        return noise

    return mock.patch.object(module, "randn_tensor", draw)


def run_with_their_noise(name, ours, reference, steps=8):
    """Runs an unmodified diffusers pipeline, then ours with the noise that diffusers drew; returns the pictures of
    both."""
    config = DDPM | ({"sample_max_value": 1.0} if name == "2" else {})
    ours.scheduler, reference.scheduler = from_config(config), scheduler(config)
    started: list[np.ndarray] = []
    stepped: list[np.ndarray] = []
    call, mine, its = TWO, {}, {}
    if name == "2":
        pictures = PICTURES.astype(precision())
        noising = ours.extras.low_res_noise.scheduler.config | {"_class_name": "DDPMScheduler"}
        reference.image_noising_scheduler = scheduler(noising)
        call, mine, its = TWO | {"noise_level": 250}, {"image": pictures}, {"image": first(2 * pictures - 1)}
    modules = [sys.modules[type(one).__module__] for one in (reference, reference.scheduler)]
    with recording(modules[0], started), recording(modules[1], stepped):
        theirs = reference(
            **call,
            **its,
            num_inference_steps=steps,
            output_type="np",
            clean_caption=False,
            generator=torch.Generator().manual_seed(7),
        ).images
    # diffusers draws no noise for the last call, which adds none.
    noise = np.stack([*stepped, np.zeros_like(stepped[0])])
    mine |= {"latents": started[0], "noise": noise} | ({"image_noise": started[1]} if name == "2" else {})
    assert len(noise) == steps
    assert len(started) == (2 if name == "2" else 1)
    return ours(**call, **mine, steps=steps, output="float").images, theirs


@pytest.mark.parametrize("name", ["1", "2"])
def test_noise_of_torchs_generator(name, both):
    """Given the noise that torch's generator drew, a complete run of DDPM with learned variance agrees with
    diffusers'."""
    a, b = run_with_their_noise(name, *both(name))
    assert relative(a, b) < 3e-4
    assert (np.abs(a - b) > 2e-3).mean() <= 1e-3
    assert a.std() > 0.05


@pytest.mark.parametrize("name", ["1", "2"])
def test_noise_of_torchs_generator_in_float64(name, both):
    pipelines = both(name, "float64")
    with double():
        a, b = run_with_their_noise(name, *pipelines)
        assert relative(a, b) < 1e-9


def test_tokens(both):
    """Short texts are padded, and the text that is too long is truncated."""
    ours, reference = both("1")
    texts = ["A Cat  at", "", "x" * 99, "é? <pad> z"]
    with pytest.warns(UserWarning, match="the text encoder reads 77 tokens"):
        tokens = ours.tokenizer(texts)
    expected = reference.tokenizer(
        [text.lower().strip() for text in texts], padding="max_length", max_length=77, truncation=True
    )
    np.testing.assert_array_equal(tokens[:, 0], expected.input_ids)
    np.testing.assert_array_equal(tokens[:, 1], expected.attention_mask)


def test_embeddings(both):
    ours, reference = both("1")
    prompt, negative = reference.encode_prompt(["a cat", "dog"], negative_prompt=["bad", ""])
    states = ours.encode(["a cat", "dog", "bad", ""]).states
    assert relative(states, torch.cat([prompt, negative]).detach().numpy()) < 1e-5
