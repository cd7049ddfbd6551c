"""Functions that check the sizes of a call's pictures and tiles, and build SDXL's size conditioning."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sega_jax.method.checks import check_int
from sega_jax.method.naming import assignment, name_of
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.nn.vae_tiling import SHARES
from sega_jax.systems.base import Sizes


def state_shape(sizes: Sizes, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Returns the state's (height, width, channels) for a picture of the given size in pixels.

    Raises:
        TypeError, ValueError: A size is not a positive multiple of the checkpoint's factor, or it is None although the
            checkpoint has no default.
    """
    shape: list[int] = []
    for name, value, default in zip(("height", "width"), (height, width), sizes.default or (None, None), strict=True):
        if value is not None:
            pixels = check_int(name, value, 1)
        elif default is not None:
            pixels = default
        else:
            raise ValueError(
                f"without a low-resolution picture, {name_of(name)} has no default; give a number of pixels"
            )
        if pixels % sizes.multiple:
            near = max(pixels // sizes.multiple, 1) * sizes.multiple
            raise ValueError(
                f"{assignment(name, pixels)} is not a multiple of {sizes.multiple}, this checkpoint's factor; try"
                f" {near}"
            )
        shape.append(pixels // sizes.factor)
    return shape[0], shape[1], sizes.channels


def shape_from(
    sizes: Sizes, height: int | None, width: int | None, image: Sequence[int] | None
) -> tuple[int, int, int]:
    """Returns the state's (height, width, channels) for a call that may start from a picture or enlarge one.

    Args:
        height, width: The call's arguments, in pixels.
        image: The (height, width), in pixels, of the picture to start from or to enlarge; None without a picture.

    Raises:
        TypeError, ValueError: `state_shape` raises an error, or the picture's size does not fit the requested size.
    """
    if image is None:
        return state_shape(sizes, height, width)
    default = sizes.default or tuple(sizes.enlarges * side for side in image)
    requested = [other if side is None else side for side, other in zip((height, width), default, strict=True)]
    shape = state_shape(sizes, *requested)
    result = [sizes.factor * side for side in shape[:2]]
    if not sizes.enlarges:
        if list(image) != result:
            raise ValueError(
                f"{name_of('image')} has {times(image)} pixels (height x width), expected {times(result)}, the size of"
                f" the result; resize it, or give {assignment('height', image[0])} and {assignment('width', image[1])}"
            )
        return shape
    if [sizes.enlarges * side for side in image] != result:
        raise ValueError(
            f"{name_of('image')} has {times(image)} pixels (height x width), expected"
            f" {times([side // sizes.enlarges for side in result])} for a result of {times(result)}, {sizes.enlarges}"
            f" times as large; resize it, or give {assignment('height', sizes.enlarges * image[0])} and"
            f" {assignment('width', sizes.enlarges * image[1])}"
        )
    return shape


def size_conditioning(
    size: tuple[int, int], rows: int, original_size: Any = None, crops_top_left: Any = None, target_size: Any = None
) -> np.ndarray:
    """Returns SDXL's size conditioning, int [rows, 6].

    The columns are the height and width of the original, the top and left edges of the crop, and the height and width
    of the target.

    Args:
        size: The (height, width) of the pictures, which is the default for `original_size` and `target_size`.
        original_size, crops_top_left, target_size: One pair for all rows, or a list with one pair for each row. The
            default of `crops_top_left` is (0, 0).

    Raises:
        ValueError: The number of pairs differs from the number of rows.
    """
    values = {
        "original_size": (original_size, size),
        "crops_top_left": (crops_top_left, (0, 0)),
        "target_size": (target_size, size),
    }
    return np.concatenate([_pairs(name, *value, rows) for name, value in values.items()], -1)


def _pairs(name: str, value: Any, default: tuple[int, int], rows: int) -> np.ndarray:
    pairs = value if isinstance(value, list) else [default if value is None else value] * rows
    if len(pairs) != rows:
        raise ValueError(f"{name} has {len(pairs)} pairs for {rows} pictures; give one pair for all, or one for each")
    return np.array(pairs)


def tile_side(vae: AutoencoderKL | None, tiled: Any) -> int | None:
    """Returns the side length of a decoder's tiles, in latent positions; None means that tiling is off.

    Args:
        tiled: False for no tiling, True to use the autoencoder's training size as the tile size, or the side length
            of a tile in pixels.

    Raises:
        TypeError, ValueError: The side length is not a multiple of 4 times the autoencoder's factor (tiles overlap by a
            quarter of their side), or there is no autoencoder.
    """
    if tiled is False:
        return None
    if vae is None:
        raise ValueError(
            f"{assignment('tiled', tiled)} needs an autoencoder, but this checkpoint has none; leave it out"
        )
    config, multiple = vae.config, SHARES * vae.config.factor
    default = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    pixels = default if tiled is True else check_int("tiled", tiled, 1)
    if pixels % multiple:
        near = max(pixels // multiple, 1) * multiple
        raise ValueError(f"{assignment('tiled', pixels)} is not a multiple of {multiple}; try {near}")
    return pixels // config.factor


def times(size: Sequence[int]) -> str:
    """Formats (height, width) as "64x64"."""
    return "x".join(map(str, size))
