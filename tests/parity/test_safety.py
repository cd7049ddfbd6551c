"""Compares the safety checker with diffusers and transformers: pixels, cosines, flags, and the pictures of complete
calls."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import jax
import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion import safety_checker
from PIL import Image
from support import tiny

from parity import theirs
from parity.theirs import first, last, noise, pair, relative
from sega_jax.nn import safety
from sega_jax.pipelines.safety import FeatureExtractor, check

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:the safety checker flagged:UserWarning")]

# The expected flags for the thresholds from `tiny.thresholds`.
FLAGGED = [True, True, False, False]
CALL = {"prompt": ["a cat", "dog", "e", "no"], "num_inference_steps": 4, "editing_prompt": "b", "edit_warmup_steps": 1}


def cosines(checker, pixels):
    """Returns the cosines with the special-care concepts, and those with all other concepts."""
    with torch.no_grad():
        pictures = checker.visual_projection(checker.vision_model(pixels)[1])
        both = checker.special_care_embeds, checker.concept_embeds
        return [safety_checker.cosine_distance(pictures, embeds).numpy() for embeds in both]


def set_thresholds(ours, theirs, care, near):
    """Sets the thresholds of both checkers."""
    for name, values in (("special_care_embeds_weights", care), ("concept_embeds_weights", near)):
        getattr(ours, name)[...] = jax.numpy.asarray(values)
        getattr(theirs, name).data = torch.tensor(values)


@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu", "num_hidden_layers": 3, "patch_size": 4}])
def test_checker(options):
    """Cosines agree to 1e-5 and all flags agree. The thresholds are within the range of the cosines."""
    config = tiny.SAFETY | {"vision_config": tiny.SAFETY["vision_config"] | options}
    ours, checker = pair(
        safety.StableDiffusionSafetyChecker(safety.SafetyCheckerConfig.from_dict(config)),
        safety_checker.StableDiffusionSafetyChecker(transformers.CLIPConfig(**config)),
    )
    pixels = noise(300, 12, 12, 3)
    expected = cosines(checker, first(pixels))
    for mine, cosine in zip(jax.jit(lambda net: net.cosines(pixels))(ours), expected, strict=True):
        assert relative(mine, cosine) < 1e-5
    near = np.quantile(expected[1], 0.97, axis=0)
    flagged = []
    for care in np.full(3, 2, np.float32), np.quantile(expected[0], 0.8, axis=0), np.full(3, -2, np.float32):
        set_thresholds(ours, checker, care, near)
        pictures, flags = checker(first(pixels), np.ones((300, 2, 2, 3)))
        assert np.array_equal(jax.jit(check)(ours, pixels), flags)
        assert [not picture.any() for picture in pictures] == flags
        flagged.append(sum(flags))
    assert 0 < flagged[0] < flagged[1] < flagged[2] < 300


CONFIGS = {
    "published": {"crop_size": 224, "size": 224, "resample": 3},
    "as saved by transformers 5": transformers.CLIPImageProcessorPil().to_dict() | {"resample": 3},
    "small": tiny.FEATURES,
    "with a border": {"size": {"shortest_edge": 7}, "crop_size": {"height": 12, "width": 12}},
    "other numbers": {"size": 20, "crop_size": 15, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    "a different rescale factor": {"size": 20, "crop_size": 15, "rescale_factor": 1 / 128},
}


@pytest.mark.parametrize("size", [(512, 512), (512, 768), (600, 344), (64, 64), (30, 101), (13, 13), (9, 4), (1, 50)])
@pytest.mark.parametrize("name", CONFIGS)
def test_preprocessing(name, size, tmp_path):
    """All values equal transformers' exactly."""
    tiny.write_json(tmp_path / "preprocessor_config.json", CONFIGS[name])
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    expected = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    pixels = FeatureExtractor(tmp_path, processor.crop_size["height"])(images)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, last(expected))


@pytest.fixture(scope="module")
def both(tmp_path_factory, one_device):
    """Loads a checkpoint with a safety checker into both our semantic pipeline and diffusers'."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("checkpoints") / "checked", safety=tiny.SAFETY)
    ours, reference = theirs.load(folder, "float32", one_device)
    # Without this, diffusers resizes with torchvision if torchvision is installed.
    reference.feature_extractor = transformers.CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    return ours, reference


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_pictures(size, both):
    """Two pictures are flagged, the second only because it matches a special-care concept."""
    ours, reference = both
    call = CALL | dict(zip(("height", "width"), size, strict=True))
    latents = noise(4, *ours.pipeline.latent_shape(*size), seed=2)
    checker, reference.safety_checker = reference.safety_checker, None
    plain = reference(**call, latents=first(latents))
    reference.safety_checker = checker
    assert plain.nsfw_content_detected is None
    pixels = reference.feature_extractor(plain.images, return_tensors="pt").pixel_values
    set_thresholds(ours.safety_checker, checker, *tiny.thresholds(*cosines(checker, pixels)))

    a, b = ours(**call, latents=latents, output_type="np"), reference(**call, latents=first(latents), output_type="np")
    assert a.nsfw_content_detected == b.nsfw_content_detected == FLAGGED
    assert not a.images[:2].any()
    assert not b.images[:2].any()
    assert a.images[2:].any((1, 2, 3)).all()
    assert (np.abs(a.images - b.images) > 2e-3).mean() <= 1e-3

    (a, flags), (b, their_flags) = (
        ours(**call, latents=latents, return_dict=False),
        reference(**call, latents=first(latents), return_dict=False),
    )
    assert flags == their_flags == FLAGGED
    for picture, expected in zip(a, b, strict=True):
        assert (picture.size, picture.mode) == (expected.size, expected.mode)
        assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1


def test_latents(both):
    ours, reference = both
    latents = noise(4, 8, 8, 4)
    a, b = (
        ours(**CALL, latents=latents, output_type="latent"),
        reference(**CALL, latents=first(latents), output_type="latent"),
    )
    assert a.nsfw_content_detected is b.nsfw_content_detected is None
    assert relative(a.images, last(b.images)) < 3e-4
