"""The safety checker, which preprocesses pictures on the host and flags them on the devices."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sega_jax.nn.config import build
from sega_jax.nn.safety import StableDiffusionSafetyChecker
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.memory import enough_memory
from sega_jax.text.files import CheckpointError, read_json


class _Config(NamedTuple):
    """The fields of a `preprocessor_config.json`, with transformers' defaults."""

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
    """CLIP's preprocessing: resizes the shorter side (with Pillow's bicubic filter), crops the centre, and normalises.

    The results are the same as with transformers' `CLIPImageProcessorPil`, which diffusers uses if torchvision is not
    installed. torchvision resizes slightly differently.

    Args:
        folder: The folder with `preprocessor_config.json`.
        image_size: The side length, in pixels, of the square pictures that the vision tower takes.

    Raises:
        CheckpointError: The file is missing or broken, or the preprocessing is not supported.
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
                " pixels; take both folders from the same checkpoint"
            )
        self.image_size = image_size
        self.rescale_factor = config.rescale_factor
        self.mean, self.std = (np.asarray(values, np.float32) for values in (config.image_mean, config.image_std))

    @property
    def config(self) -> dict[str, Any]:
        """The contents of an equivalent `preprocessor_config.json`."""
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
        """Preprocesses uint8 [pictures, height, width, 3] to float32 [pictures, image_size, image_size, 3]."""
        centres = np.stack([self._centre(Image.fromarray(image)) for image in images])
        return ((centres * self.rescale_factor).astype(np.float32) - self.mean) / self.std

    def _centre(self, image: Image.Image) -> np.ndarray:
        width, height = (int(self.size * side / min(image.size)) for side in image.size)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        # Where the crop extends beyond the picture, Pillow fills it with black.
        return np.asarray(image.crop((left, top, left + self.image_size, top + self.image_size)))


def _side(name: str, value: int | dict, *keys: str) -> int:
    """Reads an option that is either a number, or a dict with the same number under each of `keys`."""
    sides = value if isinstance(value, dict) else dict.fromkeys(keys, value)
    side = sides.get(keys[0])
    if type(side) is not int or side < 1 or sides != dict.fromkeys(keys, side):
        raise ValueError(
            f"feature extractor config: {name}={value!r} should be a size such as 224 or {dict.fromkeys(keys, 224)!r}"
        )
    return side


class Safety(NamedTuple):
    """A safety checker and its preprocessing. It keeps a pipeline from returning pictures of unsafe concepts."""

    feature_extractor: FeatureExtractor
    checker: StableDiffusionSafetyChecker


def check(safety_checker: StableDiffusionSafetyChecker, pixels: jax.Array) -> jax.Array:
    """Checks preprocessed pictures [rows, side, side, 3], and returns bool [rows], True for flagged pictures."""
    return safety_checker(pixels)


def check_pictures(
    safety: Safety | None, devices: Devices, images: np.ndarray, finite: np.ndarray
) -> np.ndarray | None:
    """Checks uint8 pictures [rows, height, width, 3], and returns bool [rows], True for flagged pictures.

    Pictures that are not finite are not flagged. Without a safety checker, the result is None.
    """
    if safety is None:
        return None
    pixels = devices.split(safety.feature_extractor(images))
    with enough_memory(pixels.shape):
        return devices.gather(devices.map(check, (None, 0))(safety.checker, pixels), len(images)) & finite
