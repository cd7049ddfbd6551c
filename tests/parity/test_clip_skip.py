"""Compares `clip_skip` with diffusers, which does not apply it to negative prompts."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import numpy as np
import torch
from support import sdxl_files, tiny

import sega_jax
from parity import theirs
from parity.theirs import first, last, noise, relative
from sega_jax.diffusers_api.stable_diffusion_xl import SemanticStableDiffusionXLPipeline

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

WORDS, BAD = ["a cat", "dog on mat"], ["bad", "no dog"]
CALL = {"negative_prompt": BAD, "num_inference_steps": 4, "guidance_scale": 6.0, "output_type": "latent"}
TEXT = tiny.TEXT | {"num_hidden_layers": 3}


@pytest.fixture(scope="module")
def one(tmp_path_factory, one_device):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("one") / "one", unet=tiny.UNET_1, text=TEXT)
    ours, semantic = theirs.load(folder, "float32", one_device)
    reference = diffusers.StableDiffusionPipeline(**semantic.components, image_encoder=None)
    reference.set_progress_bar_config(disable=True)
    # The layers are in the encoder itself in transformers 5, but diffusers 0.42.1 looks for `text_encoder.text_model`.
    reference.text_encoder.__dict__.setdefault("text_model", reference.text_encoder)
    return ours, reference


@pytest.fixture(scope="module")
def xl(tmp_path_factory, one_device):
    folder = tiny.xl(tmp_path_factory.mktemp("xl") / "xl", unet=sdxl_files.UNET, vae=tiny.VAE_1, text=TEXT)
    reference = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    native = sega_jax.load(folder, dtype="float32", devices=one_device)
    return SemanticStableDiffusionXLPipeline.from_pipe(native), reference


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_states(skip, one):
    """The final layer norm follows the chosen layer; skipping all three layers leaves the token embeddings."""
    ours, reference = one
    with torch.no_grad():
        expected, _ = reference.encode_prompt(WORDS, "cpu", 1, False, clip_skip=skip)
    states = ours.pipeline.encode(WORDS, clip_skip=skip).states
    assert relative(states, expected.numpy()) < 1e-5
    assert (relative(states, ours.pipeline.encode(WORDS).states) > 0.1) == (skip > 0)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_states_of_two_encoders(skip, xl):
    """SDXL applies no final layer norm to the states, and pools the last layer no matter how many layers are
    skipped."""
    ours, reference = xl
    with torch.no_grad():
        expected, _, pooled, _ = reference.encode_prompt(WORDS, device="cpu", clip_skip=skip)
    text = ours.pipeline.encode(WORDS, clip_skip=skip)
    assert relative(text.states, expected.numpy()) < 1e-5
    assert relative(text.pooled, pooled.numpy()) < 1e-5
    assert (relative(text.states, ours.pipeline.encode(WORDS).states) > 0.1) == (skip > 0)


@pytest.mark.parametrize("family", ["one", "xl"])
def test_pictures(family, request):
    """Negative prompts use the states of the default layer."""
    ours, reference = request.getfixturevalue(family)
    latents = noise(2, *ours.pipeline.latent_shape())
    images = ours(WORDS, **CALL, latents=latents, clip_skip=1).images
    expected = reference(WORDS, **CALL, latents=first(latents), clip_skip=1).images
    assert relative(images, last(expected)) < 3e-4
    assert np.isfinite(images).all()
    assert relative(images, ours(WORDS, **CALL, latents=latents).images) > 1e-3


def test_second_prompts(xl):
    """With `clip_skip`, `prompt_2` and `negative_prompt_2` still give the same pictures as in diffusers."""
    ours, reference = xl
    latents = noise(2, *ours.pipeline.latent_shape())
    call = CALL | {"prompt_2": ["on mud", "a hat"], "negative_prompt_2": ["no", "bad"], "clip_skip": 2}
    images = ours(WORDS, **call, latents=latents).images
    assert relative(images, last(reference(WORDS, **call, latents=first(latents)).images)) < 3e-4
