"""How large the pictures of a call are, from its arguments and from a picture that it starts from or enlarges, and the
sizes that condition SDXL."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sega_jax.method.checks import check_int
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.nn.vae_tiling import SHARES
from sega_jax.systems.base import Sizes


def state_shape(sizes: Sizes, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the state of a picture of this size in pixels.

    Raises:
        TypeError, ValueError: a size that is no positive multiple of the checkpoint's factor, or none where only a
            low-resolution picture decides it.
    """
    shape: list[int] = []
    for name, value, default in zip(("height", "width"), (height, width), sizes.default or (None, None), strict=True):
        if value is not None:
            pixels = check_int(name, value, 1)
        elif default is not None:
            pixels = default
        else:
            raise ValueError(f"{name}=None is known of a low-resolution picture only; give a number of pixels")
        if pixels % sizes.multiple:
            near = max(pixels // sizes.multiple, 1) * sizes.multiple
            raise ValueError(
                f"{name}={pixels} is not a multiple of {sizes.multiple}, this checkpoint's factor; try {near}"
            )
        shape.append(pixels // sizes.factor)
    return shape[0], shape[1], sizes.channels


def shape_from(
    sizes: Sizes, height: int | None, width: int | None, small: Sequence[int] | None
) -> tuple[int, int, int]:
    """Returns the shape of the state where the call has a picture of this (height, width): one that it enlarges or
    starts from; None for none.

    Raises:
        TypeError, ValueError: as `state_shape`; or that picture is of another size than asked for.
    """
    if small is None:
        return state_shape(sizes, height, width)
    default = sizes.default or tuple(sizes.enlarges * side for side in small)
    asked = [u if side is None else side for side, u in zip((height, width), default, strict=True)]
    shape = state_shape(sizes, *asked)
    made = [sizes.factor * side for side in shape[:2]]
    if not sizes.enlarges:
        if list(small) != made:
            raise ValueError(
                f"image has {times(small)} pixels (height x width), expected {times(made)}, those of the picture to be"
                f" made; resize it, or give height={small[0]}, width={small[1]}"
            )
        return shape
    if [sizes.enlarges * side for side in small] != made:
        raise ValueError(
            f"image has {times(small)} pixels (height x width), expected"
            f" {times([side // sizes.enlarges for side in made])} to make {times(made)}, {sizes.enlarges} times as many"
            f" each way; resize it, or give height={sizes.enlarges * small[0]}, width={sizes.enlarges * small[1]}"
        )
    return shape


def size_conditioning(
    size: tuple[int, int], rows: int, original_size: Any = None, crops_top_left: Any = None, target_size: Any = None
) -> np.ndarray:
    """Returns the sizes that condition SDXL, int [rows, 6]: of the original picture (height, width), where it was
    cropped (top, left), and of the one that is made (height, width).

    Args:
        size: (height, width) of the pictures, in place of sizes that are None; no crop is (0, 0).
        original_size, crops_top_left, target_size: a pair for all rows, or a list of one for each.

    Raises:
        ValueError: not one pair for each row.
    """
    given = {
        "original_size": (original_size, size),
        "crops_top_left": (crops_top_left, (0, 0)),
        "target_size": (target_size, size),
    }
    return np.concatenate([_pairs(name, *one, rows) for name, one in given.items()], -1)


def _pairs(name: str, value: Any, default: tuple[int, int], rows: int) -> np.ndarray:
    pairs = value if isinstance(value, list) else [default if value is None else value] * rows
    if len(pairs) != rows:
        raise ValueError(f"{name} has {len(pairs)} pairs for {rows} pictures; give one for all, or one each")
    return np.array(pairs)


def tile_side(vae: AutoencoderKL | None, tiled: Any) -> int | None:
    """Returns the side of the tiles that are decoded, in positions of the state; None for the whole picture.

    Args:
        tiled: True for the size of the autoencoder's training, a number of pixels, or False.

    Raises:
        TypeError, ValueError: the size is no multiple of what tiles share, or there is no autoencoder.
    """
    if tiled is False:
        return None
    if vae is None:
        raise ValueError(f"tiled={tiled!r} needs an autoencoder, and this checkpoint has none; leave it out")
    config, multiple = vae.config, SHARES * vae.config.factor
    default = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    pixels = default if tiled is True else check_int("tiled", tiled, 1)
    if pixels % multiple:
        near = max(pixels // multiple, 1) * multiple
        raise ValueError(f"tiled={pixels} is not a multiple of {multiple}; try {near}")
    return pixels // config.factor


def times(size: Sequence[int]) -> str:
    """Writes (height, width) as "64x64"."""
    return "x".join(map(str, size))
