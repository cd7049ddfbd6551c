"""The safety check: pictures prepared on the host, and the program that flags them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sega_jax.nn.config import build
from sega_jax.nn.safety import StableDiffusionSafetyChecker
from sega_jax.pipelines.execution.chunks import enough_memory
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.text.files import CheckpointError, read_json


class _Config(NamedTuple):
    """The fields of `preprocessor_config.json`, with transformers' defaults."""

    size: int | dict = 224
    crop_size: int | dict = 224
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_FIXED = dict.fromkeys(_STEPS, (True, None)) | {
    "resample": (Image.Resampling.BICUBIC.value, None),
    "default_to_square": (False, None),
    "use_square_size": (False, None),
    "do_pad": (False, None),
}


class FeatureExtractor:
    """CLIP's preprocessing: the shorter side resized (bicubic, by Pillow), the centre cropped, values normalised.

    It equals transformers' `CLIPImageProcessorPil`, which is what diffusers uses where torchvision is not
    installed; torchvision resizes a little differently.

    Args:
        folder: holds `preprocessor_config.json`.
        image_size: the side of the pictures that the vision tower takes.

    Raises:
        CheckpointError: a missing or broken file, or preprocessing that is not supported.
    """

    def __init__(self, folder: Path, image_size: int):
        values = read_json(folder / "preprocessor_config.json")
        try:
            config = build(_Config, values, "feature extractor", fixed=_FIXED, strict=False)
            self.size = _side("size", config.size, "shortest_edge")
            crop = _side("crop_size", config.crop_size, "height", "width")
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        if crop != image_size:
            raise CheckpointError(
                f"{folder}: crop_size={config.crop_size!r}, but the safety checker takes {image_size} x {image_size}"
                " pixels; do the two folders belong together?"
            )
        self.image_size = image_size
        self.rescale_factor = config.rescale_factor
        self.mean, self.std = (np.asarray(values, np.float32) for values in (config.image_mean, config.image_std))

    @property
    def config(self) -> dict[str, Any]:
        """The contents of `preprocessor_config.json`."""
        mean, std = ([float(str(value)) for value in values] for values in (self.mean, self.std))
        return {
            **dict.fromkeys(_STEPS, True),
            "image_processor_type": "CLIPImageProcessor",
            "resample": Image.Resampling.BICUBIC.value,
            "size": {"shortest_edge": self.size},
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "rescale_factor": self.rescale_factor,
            "image_mean": mean,
            "image_std": std,
        }

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 pictures [pictures, height, width, 3] -> float32 [pictures, image_size, image_size, 3]."""
        centres = np.stack([self._centre(Image.fromarray(image)) for image in images])
        return ((centres * self.rescale_factor).astype(np.float32) - self.mean) / self.std

    def _centre(self, image: Image.Image) -> np.ndarray:
        width, height = (int(self.size * side / min(image.size)) for side in image.size)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        # Where this is beyond the picture it is black.
        return np.asarray(image.crop((left, top, left + self.image_size, top + self.image_size)))


def _side(name: str, value: int | dict, *keys: str) -> int:
    """The one number that an option gives, by itself or under each of these keys."""
    sides = value if isinstance(value, dict) else dict.fromkeys(keys, value)
    side = sides.get(keys[0])
    if type(side) is not int or side < 1 or sides != dict.fromkeys(keys, side):
        raise ValueError(
            f"feature extractor config: {name}={value!r} should be like 224 or {dict.fromkeys(keys, 224)!r}"
        )
    return side


class Safety(NamedTuple):
    """What keeps a pipeline from showing pictures of some concepts."""

    feature_extractor: FeatureExtractor
    checker: StableDiffusionSafetyChecker


def check(safety_checker: StableDiffusionSafetyChecker, pixels: jax.Array) -> jax.Array:
    """Tells whether each picture [rows, side, side, 3], resized and normalised on the host, is flagged, bool [rows]."""
    return safety_checker(pixels)


def check_pictures(
    safety: Safety | None, devices: Devices, images: np.ndarray, finite: np.ndarray
) -> np.ndarray | None:
    """Tells whether each of uint8 pictures [rows, height, width, 3] is flagged, none of those that are not finite; None
    without a safety checker."""
    if safety is None:
        return None
    pixels = devices.split(safety.feature_extractor(images))
    with enough_memory(pixels.shape):
        return devices.gather(devices.map(check, (None, 0))(safety.checker, pixels), len(images)) & finite
