"""Compares the networks with results from torch and diffusers, recorded by `reference/record.py`."""

import jax
import pytest
from reference import cases
from support import tiny
from support.recorded import recorded, relative

from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig


@pytest.mark.parametrize("name", ["sd1_ddim", pytest.param("sd2_ddim", marks=pytest.mark.slow)])
def test_networks_of_stable_diffusion(name, recorded_pipe):
    """The tolerance is a relative L2 error of 1e-5; measured errors were 2e-7 to 6e-7."""
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

    found, reference = run(*recorded_pipe(name).models), recorded(f"networks_{name}")
    assert {key: relative(found[key], reference[key]) < 1e-5 for key in reference} == dict.fromkeys(reference, True)


@pytest.mark.parametrize("name", cases.UNETS)
def test_unets(name):
    net = tiny.filled(UNet2DConditionModel(UNetConfig.from_dict(cases.UNETS[name][0])))
    found = jax.jit(UNet2DConditionModel.__call__)(net, *cases.unet_inputs(name))
    assert relative(found, recorded(f"unet_{name}")["output"]) < 1e-5


def test_t5():
    net = tiny.filled(T5EncoderModel(T5Config.from_dict(tiny.T5)))
    found = jax.jit(T5EncoderModel.__call__)(net, cases.WORDS, cases.MASK)
    assert relative(found, recorded("t5")["states"]) < 1e-5


def test_clip_text_with_projection():
    net = tiny.filled(CLIPTextModelWithProjection(CLIPTextConfig.from_dict(tiny.TEXT_PROJECTED)))
    found = jax.jit(CLIPTextModelWithProjection.__call__)(net, cases.CAPTIONS)
    assert relative(found, recorded("projection")["embeddings"]) < 1e-5
