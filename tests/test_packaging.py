"""What the package brings along, and the sizes of the published networks."""

import importlib.metadata
import math

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.published import BYT5_XL, IF_1_XL, IF_2_L, SD_1, SD_2, T5_XXL, VIT_H, X4, X4_VAE

from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems.stable_diffusion import Models
from sega_jax.weights.layout import leaves


def test_the_package_brings_no_torch():
    found, waiting = set(), ["sega_jax"]
    while waiting:
        name = waiting.pop()
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            needed = canonicalize_name(requirement.name)
            if needed not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                found.add(needed)
                waiting.append(needed)
    assert {"jax", "flax", "optax", "safetensors", "numpy"} <= found
    assert not {"torch", "diffusers", "accelerate"} & found


def parameters(module):
    return sum(map(math.prod, leaves(module).values()))


@pytest.mark.parametrize(
    ("configs", "totals"),
    [
        (SD_1, Models(text_encoder=123_060_480, unet=859_520_964, vae=83_653_863)),
        (SD_2, Models(text_encoder=340_387_840, unet=865_910_724, vae=83_653_863)),
    ],
    ids=["Stable Diffusion 1.5", "Stable Diffusion 2.1"],
)
def test_parameters_of_the_published_networks(configs, totals):
    assert Models(*map(parameters, Models.build(**configs))) == totals


@pytest.mark.parametrize(
    ("config", "total"), [(T5_XXL, 4_762_310_656), (BYT5_XL, 2_614_091_264)], ids=["T5 v1.1 XXL", "ByT5 XL"]
)
def test_parameters_of_the_published_text_encoders(config, total):
    assert parameters(T5EncoderModel(T5Config.from_dict(config))) == total


def test_parameters_of_openclips_text_encoder():
    assert parameters(CLIPTextModelWithProjection(CLIPTextConfig.from_dict(VIT_H))) == 354_032_640


@pytest.mark.parametrize(
    ("config", "total", "tensors"),
    [(IF_1_XL, 4_304_695_110, 775), (IF_2_L, 1_243_277_190, 939), (X4, 473_398_020, 687)],
    ids=["IF-I-XL", "IF-II-L", "x4 upscaler"],
)
def test_parameters_of_the_published_unets(config, total, tensors):
    unet = UNet2DConditionModel(UNetConfig.from_dict(config))
    assert (parameters(unet), len(leaves(unet))) == (total, tensors)


def test_parameters_of_the_upscalers_autoencoder():
    assert parameters(AutoencoderKL(AutoencoderConfig.from_dict(X4_VAE))) == 55_325_927
