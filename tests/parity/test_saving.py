"""diffusers loads saved pipelines and makes the same pictures with them."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import numpy as np
import torch
from support import sdxl_files, tiny

import sega_jax
from parity.theirs import first, last, noise, relative

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}


def weights(pipeline, part):
    return getattr(pipeline, part).state_dict()


@pytest.mark.parametrize("family", ["one", "two", "xl"])
def test_diffusers_loads_saved_pipelines(family, tmp_path, one_device):
    """The weights equal those of the original checkpoint exactly, and the latents equal ours."""
    if family == "xl":
        kind, folder = diffusers.StableDiffusionXLPipeline, tiny.xl(tmp_path / "xl", unet=sdxl_files.UNET)
    else:
        kind = diffusers.StableDiffusionPipeline
        parts = {"unet": tiny.UNET_1, "safety": tiny.SAFETY}
        if family == "two":
            parts = {"unet": tiny.UNET_2, "text": tiny.TEXT_2}
        folder = tiny.checkpoint(tmp_path / family, **parts)
    native = sega_jax.load(folder, devices=one_device)
    saved = native.save(tmp_path / "saved", progress=False)
    pipe, expected = kind.from_pretrained(saved), kind.from_pretrained(folder)
    parts = [name for name, part in expected.components.items() if isinstance(part, torch.nn.Module)]
    assert [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)] == parts
    for part in parts:
        theirs, ours = weights(expected, part), weights(pipe, part)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    latents = noise(1, *native.latent_shape())
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a cat", **CALL, latents=first(latents)).images
    ours = native("a cat", steps=3, guidance_scale=5.0, output="latent", latents=latents).images
    assert relative(ours, last(theirs)) < 3e-4
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("stage", ["stage1", "stage2", "upscaler"])
def test_diffusers_builds_the_networks_of_cascades(stage, stages, first_stage, tmp_path):
    """From the saved config of the UNet, diffusers builds the same network as from the original config."""
    native = first_stage(stage)
    saved = native.save(tmp_path / "saved", progress=False)
    saved_unet, expected = (
        diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet") for folder in (saved, stages[stage])
    )
    assert saved_unet.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(saved_unet.state_dict()[key], tensor) for key, tensor in expected.state_dict().items())
    ignored = {"_name_or_path", "_use_default_values", "_diffusers_version"}
    assert all(saved_unet.config[key] == value for key, value in expected.config.items() if key not in ignored)


@pytest.fixture
def first_stage(request):
    names = {"stage1": "first", "stage2": "second", "upscaler": "upscaler"}
    return lambda stage: request.getfixturevalue(names[stage])
