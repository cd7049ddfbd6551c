"""Compares Stable Diffusion 1.5 pictures with the ones that diffusers published for its semantic guidance.

The tests run if the environment variable SEGA_JAX_SD15 names a folder with the weights, or a repository on the hub:

    SEGA_JAX_SD15=stable-diffusion-v1-5/stable-diffusion-v1-5 pytest tests/pipelines/test_published_pictures.py

SEGA_JAX_NOISE may name a folder that `tests/reference/record_cuda_noise.py` wrote; otherwise the noise is computed.
`sega-jax verify` makes the same comparison without pytest.
"""

import os
from pathlib import Path

import pytest

import sega_jax
from sega_jax.diffusers_api import published_pictures

MODEL, NOISE = os.environ.get("SEGA_JAX_SD15"), os.environ.get("SEGA_JAX_NOISE")

pytestmark = pytest.mark.skipif(MODEL is None, reason="SEGA_JAX_SD15 does not name the weights of Stable Diffusion 1.5")


@pytest.fixture(scope="module")
def pipe():
    return sega_jax.SemanticStableDiffusionPipeline.from_pretrained(MODEL, dtype="float32", safety_checker=None)


@pytest.mark.parametrize("picture", published_pictures.PICTURES, ids=lambda picture: picture.name)
def test_published_picture(pipe, picture):
    noise = published_pictures.noise(picture.seed, None if NOISE is None else Path(NOISE))
    assert published_pictures.difference(pipe, picture, noise) < published_pictures.TOLERANCE
