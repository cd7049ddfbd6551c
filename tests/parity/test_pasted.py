"""Passes real torch objects to our pipelines, as code that was written for diffusers does."""

import inspect

import pytest

pytest.importorskip("torch")

import jax
import numpy as np
import torch
from PIL import Image
from support import sdxl_files, tiny

import sega_jax.diffusers_api as api
from sega_jax.diffusers_api import StableDiffusionPipeline, StableDiffusionXLPipeline
from sega_jax.diffusers_api.torch_values import Seeds, devices_of, is_dtype, is_generator
from sega_jax.pipelines.execution.devices import Devices

pytestmark = pytest.mark.parity


def test_dtypes_and_devices(small_folder):
    """Torch dtypes and devices are recognised and have the same effect as their names."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert is_dtype(dtype)
    current = Devices(jax.devices()[:1])
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        assert not is_dtype(device)
        assert devices_of(device, current) is current
    pipe = StableDiffusionPipeline.from_pretrained(small_folder, torch_dtype=torch.bfloat16, device_map="cpu")
    assert str(pipe.dtype) == "bfloat16"
    assert str(pipe.to(torch.device("cpu"), torch.float32).dtype) == "float32"


def test_generators():
    """The first picture has the generator's seed, and the next one has a different seed."""
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
    """`encode_prompt` returns the same embeddings as in diffusers, in the same order."""
    diffusers = pytest.importorskip("diffusers")
    call = {"num_images_per_prompt": 2, "negative_prompt": "bad"}
    if family == "xl":
        folder = tiny.xl(tmp_path / "xl", unet=sdxl_files.UNET, vae=tiny.VAE_1)
        ours, theirs = StableDiffusionXLPipeline, diffusers.StableDiffusionXLPipeline
        call |= {"prompt_2": "a dog", "negative_prompt_2": "no"}
    else:
        folder = tiny.checkpoint(tmp_path / "one", unet=tiny.UNET_1)
        ours, theirs = StableDiffusionPipeline, diffusers.StableDiffusionPipeline
    pipe, reference = ours.from_pretrained(folder, devices=one_device), theirs.from_pretrained(folder)
    with torch.no_grad():
        for options in (call, call | {"negative_prompt": None} if family == "one" else {"prompt_2": "a dog"}):
            default = {"num_images_per_prompt": 1} | options
            expected = reference.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True, **default)
            embeddings = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True, **default)
            assert len(embeddings) == len(expected)
            for array, tensor in zip(embeddings, expected, strict=True):
                np.testing.assert_allclose(array, tensor.numpy(), atol=1e-5)
    embeds = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert embeds[1] is None
    with pytest.raises(ValueError, match="negative_prompt has 2 entries, expected 1, one for each prompt"):
        pipe.encode_prompt("a cat", negative_prompt=["a", "b"])


PLAIN = ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline"]
PLAIN += ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionUpscalePipeline", "IFSuperResolutionPipeline"]


@pytest.mark.parametrize("name", PLAIN)
def test_arguments_by_position(name):
    """The positional arguments are the same as in diffusers, with the same order and defaults."""
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = (
        list(inspect.signature(getattr(library, name).__call__).parameters.values()) for library in (api, diffusers)
    )
    names = [one.name for one in theirs if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    positional = [one for one in ours if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [one.name for one in positional][1:] == names[1:]
    # These default to None.
    others = ("strength", "callback_on_step_end_tensor_inputs", "aesthetic_score", "negative_aesthetic_score")
    defaults = {one.name: one.default for one in theirs if one.name not in others}
    if name.startswith("IF"):  # the stage determines their defaults
        for argument in ("num_inference_steps", "guidance_scale", "noise_level"):
            del defaults[argument]
    assert {one.name: one.default for one in positional[1:] if one.name in defaults} == {
        key: value for key, value in defaults.items() if key != "self" and value is not inspect.Parameter.empty
    }


def test_tensors(small):
    """Tensors with channels first, in any precision, give the same pictures as the corresponding arrays."""
    pipe = StableDiffusionPipeline.from_pipe(small)
    call = {"num_inference_steps": 2, "output_type": "np", "progress": False}
    rng = np.random.default_rng(0)
    latents, picture = rng.standard_normal((1, 8, 8, 4), np.float32), rng.random((16, 16, 3), np.float32)
    first = torch.tensor(latents).movedim(-1, 1)
    expected = pipe("a cat", latents=latents, **call).images
    assert np.array_equal(pipe("a cat", latents=first, **call).images, expected)
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("a cat"), strict=True))
    tensors = {name: torch.tensor(value).bfloat16() for name, value in embeds.items()}
    rounded = {name: value.float().numpy() for name, value in tensors.items()}
    assert np.array_equal(
        pipe(latents=first, **tensors, **call).images, pipe(latents=latents, **rounded, **call).images
    )
    img2img = api.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    images = img2img("a cat", torch.tensor(picture).movedim(-1, 0), **call).images
    assert np.array_equal(images, img2img("a cat", picture, **call).images)


@pytest.mark.parametrize("size", [(16, 16), (19, 33)])
def test_the_size_of_a_picture(size, small, small_folder):
    """As in diffusers, the sides are rounded down to multiples of a factor, and the picture is resized."""
    diffusers = pytest.importorskip("diffusers")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    pipe = api.StableDiffusionImg2ImgPipeline.from_pipe(small)
    image = pipe("a cat", picture, num_inference_steps=3, progress=False).images[0]
    factor = small.system.sampler.sizes(small.models).multiple
    assert image.size == tuple(side - side % factor for side in size)
    reference = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=factor)
    expected = reference.preprocess(picture)[0].movedim(0, -1).numpy() / 2 + 0.5
    fitted = pipe._with_picture_size({"image": picture})["image"]
    np.testing.assert_allclose(np.asarray(fitted) / 255, expected, atol=1e-6)
