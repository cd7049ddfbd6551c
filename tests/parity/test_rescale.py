"""Compares rescaled guidance with diffusers' `StableDiffusionPipeline`, using the same initial noise."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import numpy as np
from support import tiny

from parity import theirs
from parity.theirs import double, first, last, noise, relative, schedule

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rescaled_guidance(dtype, tmp_path, one_device):
    folder = tiny.checkpoint(tmp_path / "tiny", unet=tiny.UNET_1)
    ours, semantic = theirs.load(folder, dtype, one_device)
    reference = diffusers.StableDiffusionPipeline(**semantic.components, image_encoder=None)
    reference.set_progress_bar_config(disable=True)
    call = {"prompt": ["a cat", "dog"], "num_inference_steps": 6, "guidance_scale": 9.0}
    if dtype == "float64":
        with double():
            check(ours, reference, call, 1e-9)
    else:
        check(ours, reference, call, 3e-4)


def check(ours, reference, call, end):
    latents = noise(2, 8, 8, 4)
    images = {}
    for config in (tiny.DDIM, tiny.DDIM | ZERO_SNR, tiny.SCHEDULERS["DPM"]):
        for share in (0.0, 0.7, 1.0):
            schedule(ours, reference, config)
            a = ours(**call, latents=latents, guidance_rescale=share, output_type="latent").images
            b = reference(**call, latents=first(latents), guidance_rescale=share, output_type="latent").images
            assert relative(a, last(b)) < end
            images[share] = a
        assert relative(images[0.7], images[0.0]) > 0.01
    native = {"steps": 6, "guidance_scale": 9.0, "latents": latents, "output": "latent"}
    mixed = ours.pipeline(call["prompt"], guidance_rescale=[0.7, 1.0], **native).images
    np.testing.assert_allclose(mixed, [images[0.7][0], images[1.0][1]], rtol=end, atol=10 * end)
