"""Values of torch in pasted code, as torch has them."""

import pytest

pytest.importorskip("torch")

import jax
import numpy as np
import torch
from support import sdxl_files, tiny

from sega_jax.diffusers_api import StableDiffusionPipeline, StableDiffusionXLPipeline
from sega_jax.diffusers_api.torch_values import Seeds, devices_of, is_dtype, is_generator
from sega_jax.pipelines.execution.devices import Devices

pytestmark = pytest.mark.parity


def test_dtypes_and_devices(small_folder):
    """They are told apart, and mean what their names say."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert is_dtype(dtype)
    current = Devices(jax.devices()[:1])
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        assert not is_dtype(device)
        assert devices_of(device, current) is current
    face = StableDiffusionPipeline.from_pretrained(small_folder, torch_dtype=torch.bfloat16, device_map="cpu")
    assert str(face.dtype) == "bfloat16"
    assert str(face.to(torch.device("cpu"), torch.float32).dtype) == "float32"


def test_generators():
    """The seed of a generator, and another one for its next picture."""
    generator = torch.Generator("cpu").manual_seed(31)
    assert is_generator(generator)
    seeds = Seeds(generator)
    assert seeds.value == 31
    seeds.advance()
    assert Seeds(generator).value != 31
    assert Seeds(generator.manual_seed(31)).value == 31
    assert 0 <= Seeds(torch.Generator()).value < 2**32
    assert not is_generator(np.random.default_rng(0))


@pytest.mark.parametrize("family", ["one", "xl"])
def test_embeddings_of_prompts(family, tmp_path, one_device):
    """`encode_prompt` returns what diffusers' does, in its order."""
    diffusers = pytest.importorskip("diffusers")
    call = {"num_images_per_prompt": 2, "negative_prompt": "bad"}
    if family == "xl":
        folder = tiny.xl(tmp_path / "xl", unet=sdxl_files.UNET, vae=tiny.VAE_1)
        ours, theirs = StableDiffusionXLPipeline, diffusers.StableDiffusionXLPipeline
        call |= {"prompt_2": "a dog", "negative_prompt_2": "no"}
    else:
        folder = tiny.checkpoint(tmp_path / "one", unet=tiny.UNET_1)
        ours, theirs = StableDiffusionPipeline, diffusers.StableDiffusionPipeline
    face, reference = ours.from_pretrained(folder, devices=one_device), theirs.from_pretrained(folder)
    with torch.no_grad():
        for options in (call, call | {"negative_prompt": None} if family == "one" else {"prompt_2": "a dog"}):
            default = {"num_images_per_prompt": 1} | options
            expected = reference.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True, **default)
            made = face.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True, **default)
            assert len(made) == len(expected)
            for array, tensor in zip(made, expected, strict=True):
                np.testing.assert_allclose(array, tensor.numpy(), atol=1e-5)
    embeds = face.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert embeds[1] is None
    with pytest.raises(ValueError, match="negative_prompt has 2 entries, expected 1, one for each prompt"):
        face.encode_prompt("a cat", negative_prompt=["a", "b"])
