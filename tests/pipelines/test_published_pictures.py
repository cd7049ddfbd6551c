"""Pictures that diffusers published for its semantic guidance, from the real weights of Stable Diffusion 1.5.

Runs where the environment variable SEGA_JAX_SD15 is a folder with these weights or their name on the hub:

    SEGA_JAX_SD15=stable-diffusion-v1-5/stable-diffusion-v1-5 pytest tests/pipelines/test_published_pictures.py

The noise is of torch's generator on a GPU. Where torch has none, SEGA_JAX_NOISE is a folder with it, written by

    for seed in (3, 9, 48):
        generator = torch.Generator("cuda").manual_seed(seed)
        noise = torch.randn((1, 4, 64, 64), generator=generator, device="cuda")
        numpy.save(f"{seed}.npy", noise.movedim(1, -1).cpu().numpy())
"""

import os
from pathlib import Path

import numpy as np
import pytest

import sega_jax

MODEL, NOISE = os.environ.get("SEGA_JAX_SD15"), os.environ.get("SEGA_JAX_NOISE")

pytestmark = pytest.mark.skipif(MODEL is None, reason="SEGA_JAX_SD15 names no weights of Stable Diffusion 1.5")

# A seed, the arguments, and the last 3 x 3 values of blue.
PICTURES = {
    "sunglasses": (
        3,
        {
            "prompt": "a photo of a cat",
            "editing_prompt": ["sunglasses"],
            "reverse_editing_direction": [False],
            "edit_warmup_steps": 10,
            "edit_guidance_scale": 6,
            "edit_threshold": 0.95,
        },
        [0.4189, 0.3773, 0.3014, 0.4142, 0.4166, 0.3628, 0.3619, 0.4336, 0.4300],
    ),
    "no crowd": (
        9,
        {
            "prompt": "an image of a crowded boulevard, realistic, 4k",
            "editing_prompt": "crowd, crowded, people",
            "reverse_editing_direction": True,
            "edit_warmup_steps": 10,
            "edit_guidance_scale": 8.3,
            "edit_threshold": 0.9,
        },
        [0.3090, 0.3050, 0.2902, 0.3063, 0.3257, 0.2942, 0.2908, 0.2872, 0.2770],
    ),
    "boat and monet": (
        48,
        {
            "prompt": "a castle next to a river",
            "editing_prompt": ["boat on a river, boat", "monet, impression, sunrise"],
            "reverse_editing_direction": False,
            "edit_warmup_steps": [15, 18],
            "edit_guidance_scale": 6,
            "edit_threshold": [0.9, 0.8],
        },
        [0.7355, 0.7537, 0.7434, 0.6648, 0.6473, 0.6304, 0.6481, 0.6750, 0.6517],
    ),
}


@pytest.fixture(scope="module")
def face():
    return sega_jax.SemanticStableDiffusionPipeline.from_pretrained(MODEL, dtype="float32", safety_checker=None)


def noise(seed):
    if NOISE is not None:
        return np.load(Path(NOISE) / f"{seed}.npy")
    torch = pytest.importorskip("torch", reason="SEGA_JAX_NOISE names no folder of noise, and torch is not there")
    if not torch.cuda.is_available():
        pytest.skip("SEGA_JAX_NOISE names no folder of noise, and torch has no GPU to draw it")
    drawn = torch.randn((1, 4, 64, 64), generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    return drawn.movedim(1, -1).cpu().numpy()


@pytest.mark.parametrize("name", PICTURES)
def test_published_picture(face, name):
    seed, call, wanted = PICTURES[name]
    settings = {"guidance_scale": 7, "edit_momentum_scale": 0.5, "edit_mom_beta": 0.6, "output_type": "np"}
    image = face(**call, **settings, latents=noise(seed)).images[0]
    assert np.abs(image[-3:, -3:, -1].ravel() - wanted).max() < 1e-2
