"""Compares Stable Diffusion XL with diffusers, using the same noise.

The tests compare networks and pictures with diffusers' pipelines, and edits with a plain torch loop that calls
diffusers' UNet.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import contextlib
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from support import tiny

import sega_jax
from parity import if_loops, theirs
from parity.theirs import double, first, fresh, last, noise, pair, relative, schedule
from sega_jax import Edit, SemanticStableDiffusionXLPipeline
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.unet import Context, UNet2DConditionModel, UNetConfig

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

SEEDS, STEPS = [3, 8], 8
PROMPTS = ["a cat at", "dog,"]
SIZES = {"original_size": (20, 34), "crops_top_left": (3, 5), "target_size": (24, 16)}
# Additional arguments for the calls of both libraries.
CALLS = {
    "no negative": {},
    "negative words": {"negative_prompt": ["bad", ""]},
    "empty words": {"negative_prompt": ["", ""]},
    "sizes": SIZES | {"height": 24, "width": 16},
}
EDITS = {
    "one": [Edit("smile", scale=6, threshold=0.8, warmup=2)],
    "three": [
        Edit("smile", scale=6, threshold=0.8, warmup=1),
        Edit("a hat", scale=-4, threshold=0.95, warmup=3, cooldown=6, weight=0.5),
        Edit("snow", scale=2, threshold=0.0, warmup=5),
    ],
}


@pytest.fixture(scope="module")
def both(tmp_path_factory, one_device):
    """Returns a function that loads both pipelines. With `zeros=True`, zeros replace a missing negative prompt."""
    folder = tmp_path_factory.mktemp("xl")

    @functools.cache
    def load(dtype="float32", zeros=True):
        where = folder / str(zeros)
        if not where.is_dir():
            tiny.xl(where, index={"force_zeros_for_empty_prompt": zeros})
        with jax.enable_x64(dtype == "float64"):
            ours = sega_jax.load(where, dtype=dtype, devices=one_device)
        reference = diffusers.StableDiffusionXLPipeline.from_pretrained(where, add_watermarker=False)
        reference.set_progress_bar_config(disable=True)
        return ours, reference.to(dtype=getattr(torch, dtype))

    return load


def test_text_encoders():
    ids = np.random.default_rng(0).integers(0, 56, (3, 12)).astype(np.int32)
    ids[:, [0, 5]] = 56, 57
    ids[1, 6:], ids[2, 6:] = 0, 57
    torch_ids = torch.tensor(ids, dtype=torch.long)
    config = transformers.CLIPTextConfig(**tiny.TEXT)
    one, reference = pair(CLIPTextModel(CLIPTextConfig.from_dict(tiny.TEXT)), transformers.CLIPTextModel(config))
    expected = reference(torch_ids, output_hidden_states=True).hidden_states[-2]
    assert relative(one.penultimate(jnp.asarray(ids)), expected) < 1e-5
    config = transformers.CLIPTextConfig(**tiny.TEXT_XL_2)
    two = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(tiny.TEXT_XL_2))
    two, reference = pair(two, transformers.CLIPTextModelWithProjection(config))
    expected = reference(torch_ids, output_hidden_states=True)
    states, pooled = two.states(jnp.asarray(ids))
    assert relative(states, expected.hidden_states[-2]) < 1e-5
    assert relative(pooled, expected.text_embeds) < 1e-5
    assert relative(two(jnp.asarray(ids)), expected.text_embeds) < 1e-5


def test_unet():
    """Each x has several branches with different texts and sizes."""
    config = tiny.UNET_XL
    net = UNet2DConditionModel(UNetConfig.from_dict(config))
    ours, reference = pair(net, diffusers.UNet2DConditionModel.from_config(config))
    x, states, pooled = noise(2, 8, 12, 4), noise(6, 12, 36, seed=1), noise(6, 12, seed=2)
    sizes = np.random.default_rng(3).integers(0, 1500, (6, 6)).astype(np.float32)
    t = np.array([999.0, 999.0], np.float32)
    context = Context(*map(jnp.asarray, (states, pooled, sizes)))
    added = {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(sizes)}
    expected = reference(
        first(np.repeat(x, 3, 0)), 999, encoder_hidden_states=torch.tensor(states), added_cond_kwargs=added
    ).sample
    assert relative(ours(jnp.asarray(x), jnp.asarray(t), context), last(expected)) < 1e-5
    assert relative(ours(jnp.asarray(x), jnp.asarray(t), ours.project(context)), last(expected)) < 1e-5


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_pictures(call, zeros, both):
    check_pictures(both("float32", zeros), CALLS[call], tiny.EULER, 1e-4)


@pytest.mark.parametrize("name", ["DDIM", "DPM", "UniPC"])
def test_schedulers(name, both):
    check_pictures(both(), CALLS["negative words"], tiny.SCHEDULERS[name], 1e-4)


def test_pictures_in_double(both):
    loaded = both("float64")
    with double():
        check_pictures(loaded, CALLS["sizes"], tiny.DDIM, 1e-9)


def check_pictures(both, call, config, end):
    ours, reference = both
    schedule(Ours(ours), reference, config)
    shape = ours.latent_shape(call.get("height"), call.get("width"))
    start, seen, expected = noise(2, *shape), [], []
    a = ours(
        PROMPTS,
        steps=STEPS,
        latents=start,
        output="float",
        callback=lambda *step: seen.append(step[2]),
        progress=False,
        **call,
    )

    def keep(pipe, i, t, values):
        expected.append(last(values["latents"]))
        return values

    renamed = {"crops_top_left": "crops_coords_top_left"}
    b = reference(
        PROMPTS,
        num_inference_steps=STEPS,
        latents=first(start),
        output_type="np",
        callback_on_step_end=keep,
        **{renamed.get(name, name): value for name, value in call.items()},
    )
    assert len(seen) == len(expected) == STEPS
    assert max(relative(x, y) for x, y in zip(seen, expected, strict=True)) < end
    np.testing.assert_allclose(a.images, b.images, atol=20 * end)


# Arguments for calls of our diffusers-style pipeline and of diffusers' pipeline.
DIFFUSERS_CALLS = {
    "default settings": {"prompt": "a cat at"},
    "second prompts": {
        "prompt": PROMPTS,
        "prompt_2": ["snow", "a hat"],
        "negative_prompt": ["bad", ""],
        "negative_prompt_2": ["", "no"],
    },
    "sizes, rescaled": {
        "prompt": PROMPTS,
        "height": 24,
        "width": 16,
        "original_size": (20, 34),
        "crops_coords_top_left": (3, 5),
        "target_size": (24, 16),
        "guidance_rescale": 0.6,
    },
    "two pictures each": {"prompt": PROMPTS, "num_images_per_prompt": 2, "negative_prompt": ["bad", ""]},
    "no guidance": {"prompt": PROMPTS, "guidance_scale": 0.5},
    "timesteps": {"prompt": PROMPTS, "timesteps": [900, 500, 100, 1]},
}


@pytest.mark.parametrize("call", DIFFUSERS_CALLS)
def test_diffusers_style_pipeline(call, both):
    check_diffusers_call(both(), DIFFUSERS_CALLS[call])


def test_embeddings_of_diffusers(both):
    """A call accepts embeddings from diffusers' `encode_prompt` in place of prompts."""
    ours, reference = both()
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    with torch.no_grad():
        embeddings = reference.encode_prompt(PROMPTS, device="cpu", negative_prompt=["bad", ""])
    check_diffusers_call((ours, reference), dict(zip(names, embeddings, strict=True)))


def check_diffusers_call(both, call):
    ours, reference = both
    semantic = SemanticStableDiffusionXLPipeline.from_pipe(ours)
    schedule(semantic, reference, tiny.DDIM if "timesteps" not in call else tiny.EULER)
    rows = 1 if isinstance(call.get("prompt"), str) else 2 * call.get("num_images_per_prompt", 1)
    start = noise(rows, *ours.latent_shape(call.get("height"), call.get("width")))
    call = {"num_inference_steps": STEPS} | call
    for output_type, end in (("latent", 1e-4), ("np", None)):
        a = semantic(**call, latents=start, output_type=output_type, progress=False)
        b = reference(**call, latents=first(start), output_type=output_type)
        if end is None:
            np.testing.assert_allclose(a.images, b.images, atol=2e-3)
        else:
            assert relative(a.images, last(b.images)) < end


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_start_from_a_picture(strength, both):
    """Starting from pictures gives the same results as diffusers' img2img pipeline, including with sizes and negative
    prompts."""
    ours, others = both()
    reference = diffusers.StableDiffusionXLImg2ImgPipeline(**others.components, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    schedule(Ours(ours), reference, tiny.EULER)
    pictures = np.random.default_rng(3).random((2, 16, 16, 3)).astype(np.float32)
    latents, seen, expected = noise(2, *ours.latent_shape()), [], []
    call = CALLS["negative words"] | {"strength": strength, "original_size": (20, 34), "target_size": (24, 16)}
    a = ours(
        PROMPTS,
        image=pictures,
        steps=STEPS,
        seed=SEEDS,
        latents=latents,
        output="float",
        callback=lambda *step: seen.append(step[2]),
        progress=False,
        **call,
    )

    def keep(pipe, i, t, values):
        expected.append(last(values["latents"]))
        return values

    with theirs.start(type(reference), SEEDS, latents):
        b = reference(
            PROMPTS,
            image=first(pictures),
            num_inference_steps=STEPS,
            output_type="np",
            guidance_scale=5.0,
            callback_on_step_end=keep,
            **call,
        )
    assert len(seen) == len(expected) == int(STEPS * strength)
    assert max(relative(x, y) for x, y in zip(seen, expected, strict=True)) < 1e-4
    np.testing.assert_allclose(a.images, b.images, atol=2e-3)


class Ours:
    """Wraps a pipeline for `theirs.schedule`."""

    def __init__(self, pipeline):
        self.pipeline = pipeline


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize(("dtype", "end"), [("float32", 3e-4), ("float64", 1e-9)])
def test_edits(dtype, end, edits, both):
    ours, reference = both(dtype)
    with double() if dtype == "float64" else contextlib.nullcontext():
        ours.scheduler = tiny.DDIM
        shape = ours.latent_shape()
        start, draw = noise(2, *shape), fresh(SEEDS, shape)
        settings = {"momentum_scale": 0.3, "momentum_beta": 0.6, "output": "latent", "record": True, "progress": False}
        output = ours(
            PROMPTS, EDITS[edits], steps=STEPS, seed=SEEDS, guidance_scale=3.0, latents=start, **SIZES, **settings
        )
        words = [edit.concept for edit in EDITS[edits]]
        encoded = [reference.encode_prompt(PROMPTS, device="cpu", negative_prompt=None)]
        encoded += [reference.encode_prompt([word] * 2, device="cpu") for word in words]
        (cond, uncond, pooled, unpooled), *others = encoded
        states = torch.cat([uncond, cond, *(one[0] for one in others)])
        pooled = torch.cat([unpooled, pooled, *(one[2] for one in others)])
        sizes = [*SIZES["original_size"], *SIZES["crops_top_left"], *SIZES["target_size"]]
        added = {"text_embeds": pooled, "time_ids": torch.tensor([sizes] * len(pooled)).to(pooled.dtype)}

        def predict(_call, t, x):
            branches = torch.cat([x] * (2 + len(words)))
            with torch.no_grad():
                out = reference.unet(branches, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
            return out.split(2)

        expected = if_loops.sample(
            predict,
            tiny.DDIM,
            start,
            [draw(i) for i in range(STEPS)],
            steps=STEPS,
            guidance_scale=3.0,
            edits=EDITS[edits],
            momentum=(0.3, 0.6),
        )
    assert relative(output.images, expected.x) < end
    assert relative(output.record.sem_guidance, expected.sem_guidance) < 10 * end
    assert relative(output.record.edits, expected.edits) < end
