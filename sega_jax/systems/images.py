"""Pictures that come in, to start from or to be enlarged."""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from sega_jax.method.argument_kinds import Kind
from sega_jax.method.checks import brief
from sega_jax.method.numerics import at_least_float32, is_finite, is_floating
from sega_jax.systems.sizes import times


class Pictures(Kind):
    """Pictures that come in: of PIL, paths of files, or arrays."""

    noun = (
        "a PIL picture, the path of a file, or an array [height, width, 3] of uint8 or of floats in [0, 1]; or a list"
        " of them"
    )

    metavar = "FILE"

    def check(self, name: str, value: Any) -> np.ndarray:
        """Returns pictures [pictures, height, width, 3] in [-1, 1], in float32, or wider where they are.

        Raises:
            FileNotFoundError: no such file.
            TypeError, ValueError: it is none of these, the pictures are of different sizes, or a float is out of range.
        """
        return read(value)

    def check_one(self, name: str, value: Any) -> str:
        """Returns the whole path of a picture, which was read once.

        Raises:
            FileNotFoundError, TypeError, ValueError: it is none.
        """
        if not isinstance(value, str):
            raise TypeError(f"{name}={brief(value)} should be the path of a picture")
        known(value)
        return value

    def located(self, name: str, value: Any, folder: Path) -> Any:
        return str((folder / Path(value).expanduser()).resolve()) if isinstance(value, str) else value

    def several(self, value: Any) -> bool:
        return False

    def parse(self, name: str, text: str) -> str:
        """Returns the whole path of a file, which was read once to see that it is a picture."""
        read(text)
        return str(Path(text).expanduser().resolve())


class Known(NamedTuple):
    """What is known of a file with a picture."""

    size: tuple[int, int]  # height and width in pixels
    digest: str  # SHA-256 of the file


@cache
def known(path: str) -> Known:
    """Returns what is known of a file with a picture, which is read once.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no picture.
    """
    height, width = read(path).shape[1:3]
    return Known((height, width), hashlib.sha256(Path(path).read_bytes()).hexdigest())


def read(image: Any) -> np.ndarray:
    """Reads pictures [pictures, height, width, 3] in [-1, 1], in float32, or wider where they are.

    Args:
        image: a PIL picture; the path of a file; an array [height, width, 3] of uint8, or of floats in [0, 1]; several
            of them as a list or array [pictures, height, width, 3].

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: it is none of these, the pictures are of different sizes, or a float is out of range.
    """
    several = isinstance(image, list | tuple) or getattr(image, "ndim", 3) == 4
    pictures = [_one(picture) for picture in (image if several else [image])]
    if not pictures:
        raise ValueError(f"image={image!r} should be a picture, or a non-empty list of them")
    if len(sizes := {picture.shape[:2] for picture in pictures}) > 1:
        raise ValueError(f"image has pictures of {' and '.join(map(times, sorted(sizes)))} pixels; give one size")
    return np.stack(pictures)


def _opened(path: Path) -> Image.Image:
    if not os.path.isfile(path):  # also for names that no file can have
        raise FileNotFoundError(f"image={brief(str(path))} does not exist, or is no file")
    try:
        with Image.open(path) as image:
            # Upright, as it is shown.
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image={str(path)!r} is no readable picture ({error})") from None


def _one(picture: Any) -> np.ndarray:
    if isinstance(picture, str | os.PathLike):
        picture = _opened(Path(picture).expanduser())
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    try:
        array = np.asarray(picture)
    except (TypeError, ValueError, RuntimeError):  # the last is torch's, of tensors with gradients
        array = np.asarray(None)
    if array.dtype != np.uint8 and not is_floating(array.dtype):
        raise TypeError(
            f"image={brief(picture)} should be a PIL picture, the path of one, or an array (height, width, 3) of"
            " uint8 or of floats in [0, 1]"
        )
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        hint = "; pictures are channels last here" if array.ndim == 3 and array.shape[0] == 3 else ""
        raise ValueError(f"image has shape {array.shape}, expected (height, width, 3), or several of them{hint}")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 127.5 - 1
    if not is_finite(array):
        raise ValueError("image has NaN or infinite entries")
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"image has floats from {array.min():g} to {array.max():g}; give them in [0, 1], or uint8")
    return array.astype(at_least_float32(array.dtype)) * 2 - 1
