"""The library against results of torch and diffusers that `reference/record.py` recorded."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from reference import cases

import sega_jax
from sega_jax.method.schedules import from_config
from sega_jax.method.solvers import SOLVERS
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.systems import stable_diffusion as system

HERE = Path(__file__).parent / "reference"


@cache
def recorded(name):
    with np.load(HERE / f"{name}.npz") as file:
        return dict(file)


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def load(tmp_path_factory, one_device):
    @cache
    def loaded(name):
        folder = tmp_path_factory.mktemp("checkpoint") / name
        settings = (cases.CHECKPOINTS | cases.CHECKED)[name]
        return sega_jax.load(tiny.checkpoint(folder, **settings), devices=one_device)

    return loaded


@pytest.mark.parametrize("name", ["sd1_ddim", "sd2_ddim"])
def test_networks(name, load):
    """Relative L2 1e-5; measured 2e-7 to 6e-7."""
    inputs = cases.INPUTS

    @jax.jit
    def run(text_encoder, unet, vae):
        mean, logvar = vae.encode(inputs["image"])
        return {
            "text": text_encoder(inputs["ids"]),
            "unet": unet(inputs["x"], inputs["timestep"], inputs["context"]),
            "mean": mean,
            "logvar": logvar,
            "decoded": vae.decode(inputs["latents"]),
        }

    found, wanted = run(*load(name).models), recorded(f"networks_{name}")
    assert {key: relative(found[key], wanted[key]) < 1e-5 for key in wanted} == dict.fromkeys(wanted, True)


@pytest.mark.parametrize("name", cases.UNETS)
def test_unets(name):
    net = tiny.filled(UNet2DConditionModel(UNetConfig.from_dict(cases.UNETS[name][0])))
    found = jax.jit(UNet2DConditionModel.__call__)(net, *cases.unet_inputs(name))
    assert relative(found, recorded(f"unet_{name}")["output"]) < 1e-5


def test_t5():
    net = tiny.filled(T5EncoderModel(T5Config.from_dict(tiny.T5)))
    found = jax.jit(T5EncoderModel.__call__)(net, cases.WORDS, cases.MASK)
    assert relative(found, recorded("t5")["states"]) < 1e-5


def test_projected_text():
    net = tiny.filled(CLIPTextModelWithProjection(CLIPTextConfig.from_dict(tiny.TEXT_PROJECTED)))
    found = jax.jit(CLIPTextModelWithProjection.__call__)(net, cases.CAPTIONS)
    assert relative(found, recorded("projection")["embeddings"]) < 1e-5


@pytest.mark.parametrize("name", cases.SCHEDULES)
def test_schedules(name):
    """The timesteps, and every x of the trajectory to 2e-5; diffusers' coefficients are in float32."""
    config, steps, eta = cases.SCHEDULES[name]
    scheduler, wanted = from_config(config), recorded(f"schedule_{name}")
    table, solver = scheduler.table(steps), SOLVERS[scheduler.solver](eta)
    np.testing.assert_allclose(table.timestep, wanted["timesteps"], rtol=1e-5, atol=1e-4)
    update = jax.jit(lambda x, state, output, noise, row: solver.update(x, state, output, None, row, lambda _: noise))
    x, state = cases.START, solver.init(cases.START)
    for call, theirs in enumerate(wanted["path"]):
        row = jax.tree.map(lambda column, call=call: column[call], table)
        x, state = update(x, state, cases.OUTPUTS[call], cases.NOISE[call], row)
        assert relative(x, theirs) < 2e-5


@pytest.mark.filterwarnings("ignore:the safety checker flagged")
@pytest.mark.parametrize("name", cases.PICTURES)
def test_pictures(name, load):
    """Latents and guidance to 3e-4, the first call's predictions to 1e-5, and 99.9 % of pixels to 2e-3."""
    checkpoint, settings = cases.PICTURES[name]
    face, wanted = sega_jax.SemanticStableDiffusionPipeline.from_pipe(load(checkpoint)), recorded(f"pictures_{name}")
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


def test_stable_diffusion_xl(tmp_path, one_device):
    """Texts and the first call's predictions to 1e-5, latents and guidance to 3e-4, and pixels to 2e-3."""
    pipe, wanted = sega_jax.load(tiny.xl(tmp_path / "xl", **cases.XL), devices=one_device), recorded("xl")
    text = pipe.encode(cases.XL_WORDS)
    assert relative(text[:, :-1], wanted["states"][1:]) < 1e-5
    assert relative(text[:, -1, : wanted["pooled"].shape[1]], wanted["pooled"][1:]) < 1e-5
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


def same_pixels(ours, theirs):
    """Normalised values within one grey level: versions of Pillow round a resized picture differently."""
    return ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1.01 / 255 / 0.26


def test_safety_checker(load):
    """Every pixel to a level, and from the recorded ones cosines to 1e-5, and all flags."""
    safety, wanted = load("sd1_checked").safety, recorded("safety")
    pixels = np.concatenate([safety.feature_extractor(images) for images in cases.SHOWN])
    assert same_pixels(pixels, wanted["pixels"])
    pixels = wanted["pixels"]
    special, concepts, flagged = jax.jit(lambda net: (*net.cosines(pixels), system.check(net, pixels)))(safety.checker)
    assert relative(special, wanted["special"]) < 1e-5
    assert relative(concepts, wanted["concepts"]) < 1e-5
    assert np.array_equal(flagged, wanted["flagged"])
    assert set(wanted["flagged"]) == {True, False}
