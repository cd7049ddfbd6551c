"""Functions that read a call's input pictures: pictures to start from or to enlarge."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from sega_jax.method.argument_kinds import Kind
from sega_jax.method.naming import assignment, name_of
from sega_jax.method.numerics import at_least_float32, is_finite, is_floating
from sega_jax.systems.sizes import times
from sega_jax.text.files import absolute_path, sha256


class Pictures(Kind):
    """Input pictures: Pillow images, file paths or arrays."""

    noun = (
        "a Pillow image, a file path, or an array [height, width, 3] of uint8 or of floats in [0, 1]; or a list"
        " of these"
    )

    metavar = "FILE"
    of_files = True

    def check(self, name: str, value: Any) -> np.ndarray:
        """Returns an array [pictures, height, width, 3] in [-1, 1], as `read` does.

        Raises:
            FileNotFoundError, TypeError, ValueError: See `read`.
        """
        return read(value)

    def check_one(self, name: str, value: Any) -> str:
        """Returns the path of a picture without reading the file.

        Raises:
            TypeError: The value is not a string.
        """
        if not isinstance(value, str):
            raise TypeError(f"{assignment(name, value)} should be the path of an image file")
        return value

    def files(self, value: Any) -> list[str]:
        return [value]

    def label(self, value: Any) -> Any:
        return None if value is None else Path(value).name

    def known(self, path: str) -> dict[str, Any]:
        return {"digest": sha256(path), "size": list(read(path).shape[1:3])}

    def located(self, name: str, value: Any, folder: Path) -> Any:
        return absolute_path(value, folder) if isinstance(value, str) else value

    def several(self, value: Any) -> bool:
        return False

    def parse(self, name: str, text: str) -> str:
        """Checks that a file can be read as a picture, and returns the file's absolute path."""
        read(text)
        return str(Path(text).expanduser().resolve())


def read(image: Any) -> np.ndarray:
    """Returns pictures as an array [pictures, height, width, 3] in [-1, 1], in float32 or a wider input's dtype.

    Args:
        image: A Pillow image, a file path, or an array [height, width, 3] of uint8 or of floats in [0, 1]. Several
            pictures are given as a list, a tuple or an array [pictures, height, width, 3].

    Raises:
        FileNotFoundError: A file does not exist.
        TypeError, ValueError: The value has none of these forms, the pictures differ in size, or a float is out of
            range.
    """
    several = isinstance(image, list | tuple) or getattr(image, "ndim", 3) == 4
    pictures = [_as_array(picture) for picture in (image if several else [image])]
    if not pictures:
        raise ValueError(f"{assignment('image', image)} should be a picture or a non-empty list of pictures")
    if len(sizes := {picture.shape[:2] for picture in pictures}) > 1:
        raise ValueError(
            f"{name_of('image')} has pictures of {' and '.join(map(times, sorted(sizes)))} pixels; resize them to the"
            " same size"
        )
    return np.stack(pictures)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Returns a Pillow image of a picture [height, width, 3] in [-1, 1], such as one that `read` returns."""
    return Image.fromarray(np.round((pixels + 1) * 127.5).astype(np.uint8))


def _open(name: str | os.PathLike[str]) -> Image.Image:
    path = Path(name).expanduser()
    if not os.path.isfile(path):  # `Path.is_file` raises an error for names that are too long
        raise FileNotFoundError(f"{assignment('image', str(name))} does not exist or is not a file; correct the path")
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{assignment('image', str(name))} cannot be read as a picture ({error}); give another file"
        ) from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts a Pillow image of any mode to RGB, as an image viewer would show it.

    The picture is rotated according to its EXIF orientation, transparent areas become white, and only the first frame
    of an animation is used. 16-bit grey levels are scaled to 8 bits. The modes "I" and "F" have no fixed range: the
    value of white is the smallest of 1 ("F" only), 255 and 65535 that no pixel exceeds.

    Raises:
        ValueError: The pixels of a grey picture are out of range or not finite.
    """
    if getattr(image, "n_frames", 1) > 1:
        position = image.tell()
        image.seek(0)
        image, animation = image.copy(), image
        animation.seek(position)  # avoids changing the user's image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_grey(np.asarray(image).astype(np.float64), image.mode))
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, to_rgb) or image
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        # Pillow cannot convert "La" to "RGBA" directly, only via "LA".
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _grey(values: np.ndarray, mode: str) -> np.ndarray:
    """Scales the pixels of a grey picture to uint8."""
    if not np.isfinite(values).all():
        raise ValueError(f"a picture of mode {mode} has NaN or infinite values")
    limits = [65535] if ";16" in mode else [1, 255, 65535] if mode == "F" else [255, 65535]
    limit = next((one for one in limits if values.max(initial=0) <= one), None)
    if limit is None or values.min(initial=0) < 0:
        raise ValueError(
            f"a picture of mode {mode} has values from {values.min():g} to {values.max():g}, expected 0 to"
            f" {limits[-1]}; scale it to 8 bits"
        )
    return np.round(values * (255 / limit)).astype(np.uint8)


def _as_array(picture: Any) -> np.ndarray:
    if isinstance(picture, str | os.PathLike):
        picture = _open(picture)
    if isinstance(picture, Image.Image):
        picture = np.asarray(as_rgb(picture))
    try:
        array = np.asarray(picture)
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for tensors with gradients
        array = np.asarray(None)
    if array.dtype != np.uint8 and not is_floating(array.dtype):
        raise TypeError(
            f"{assignment('image', picture)} should be a Pillow image, the path of an image file, or an array (height,"
            " width, 3) of uint8 or of floats in [0, 1]"
        )
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        hint = "; move the channels to the last axis" if array.ndim == 3 and array.shape[0] == 3 else ""
        raise ValueError(
            f"{name_of('image')} has shape {array.shape}, expected (height, width, 3) or a list of such arrays{hint}"
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 127.5 - 1
    if not is_finite(array):
        raise ValueError(f"{name_of('image')} has NaN or infinite entries")
    if array.min() < 0 or array.max() > 1:
        raise ValueError(
            f"{name_of('image')} has floats from {array.min():g} to {array.max():g}, expected [0, 1]; scale them, or"
            " give uint8"
        )
    return array.astype(at_least_float32(array.dtype)) * 2 - 1
