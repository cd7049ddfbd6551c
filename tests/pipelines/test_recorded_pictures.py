"""Compares complete calls with results from torch and diffusers that `reference/record.py` recorded."""

import numpy as np
import pytest
from reference import cases
from support import tiny
from support.recorded import recorded, relative

import sega_jax


@pytest.mark.filterwarnings("ignore:the safety checker flagged")
@pytest.mark.parametrize(
    "name",
    [name if name == "three" else pytest.param(name, marks=pytest.mark.slow) for name in cases.PICTURES],
)
def test_pictures(name, recorded_pipe):
    """Tolerances: 3e-4 for latents and guidance, 1e-5 for the first call's predictions, and 2e-3 for 99.9 % of the
    pixels."""
    checkpoint, settings = cases.PICTURES[name]
    face, wanted = (
        sega_jax.SemanticStableDiffusionPipeline.from_pipe(recorded_pipe(checkpoint)),
        recorded(f"pictures_{name}"),
    )
    settings = settings | {"latents": cases.LATENTS, "return_guidance": True}
    made = face(cases.PROMPTS, output_type="latent", **settings)
    assert relative(made.images, wanted["latents"]) < 3e-4
    for key in wanted.keys() - {"latents", "images", "flagged"}:
        if key == "sem_guidance" and "editing_prompt" not in settings:
            assert not made.sem_guidance.any()
            continue
        assert relative(getattr(made, key), wanted[key]) < 3e-4, key
        if key != "sem_guidance":
            assert relative(getattr(made, key)[0], wanted[key][0]) < 1e-5, key
    shown = face(cases.PROMPTS, output_type="np", **settings)
    assert (np.abs(shown.images - wanted["images"]).max(-1) > 2e-3).mean() <= 1e-3
    assert np.array_equal(shown.nsfw_content_detected, wanted.get("flagged"))


@pytest.mark.slow
def test_stable_diffusion_xl(tmp_path, one_device):
    """Tolerances: 1e-5 for texts and the first call's predictions, 3e-4 for latents and guidance, and 2e-3 for
    pixels."""
    pipe, wanted = sega_jax.load(tiny.xl(tmp_path / "xl", **cases.XL), devices=one_device), recorded("xl")
    text = pipe.encode(cases.XL_WORDS)
    assert relative(text.states, wanted["states"][1:]) < 1e-5
    assert relative(text.pooled, wanted["pooled"][1:]) < 1e-5
    prompt, concept = cases.XL_WORDS
    call = {"steps": cases.XL_STEPS, "guidance_scale": cases.XL_SCALE, "latents": cases.XL_LATENTS, "record": True}
    call |= dict(zip(("momentum_scale", "momentum_beta"), cases.XL_MOMENTUM, strict=True)) | cases.XL_SIZES
    made = pipe(prompt, sega_jax.Edit(concept, **cases.XL_EDIT), **call, output="latent")
    assert relative(made.images, wanted["latents"]) < 3e-4
    for key in ("uncond", "cond", "edits", "sem_guidance"):
        found = getattr(made.record, key)
        assert relative(found, wanted[key]) < 3e-4, key
        if key != "sem_guidance":
            assert relative(found[:, 0], wanted[key][:, 0]) < 1e-5, key
    shown = pipe(prompt, sega_jax.Edit(concept, **cases.XL_EDIT), **call, output="float")
    assert np.abs(shown.images - wanted["image"]).max() < 2e-3
