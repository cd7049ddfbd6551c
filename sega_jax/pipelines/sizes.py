"""How large what a pipeline makes is, from what was asked for and from the small picture it may start from; and the
sizes that Stable Diffusion XL is told."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sega_jax.nn.vae import AutoencoderKL
from sega_jax.nn.vae_tiling import SHARES
from sega_jax.pipelines.batch import whole
from sega_jax.systems.base import Sizes


def state_shape(sizes: Sizes, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(height, width, channels) of the state of a picture of this size in pixels.

    Raises:
        TypeError, ValueError: a size that is no positive multiple of the checkpoint's factor, or none where the small
            picture says it.
    """
    shape = []
    for name, value, usual in zip(("height", "width"), (height, width), sizes.usual or (None, None), strict=True):
        if value is usual is None:
            raise ValueError(f"{name}=None is known of a small picture only; give a number of pixels")
        value = usual if value is None else whole(name, value, 1)
        if value % sizes.multiple:
            near = max(value // sizes.multiple, 1) * sizes.multiple
            raise ValueError(
                f"{name}={value} is not a multiple of {sizes.multiple}, this checkpoint's factor; try {near}"
            )
        shape.append(value // sizes.factor)
    return (*shape, sizes.channels)


def shape_from(
    sizes: Sizes, height: int | None, width: int | None, small: Sequence[int] | None
) -> tuple[int, int, int]:
    """Likewise of a picture that is made of one of this (height, width), small where the checkpoint enlarges, or of
    none.

    Raises:
        TypeError, ValueError: as `state_shape`; or that picture is of another size than asked for.
    """
    if small is None:
        return state_shape(sizes, height, width)
    usual = sizes.usual or tuple(sizes.enlarges * side for side in small)
    asked = [u if side is None else side for side, u in zip((height, width), usual, strict=True)]
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


def told(
    usual: tuple[int, int], rows: int, original_size: Any = None, crops_top_left: Any = None, target_size: Any = None
) -> np.ndarray:
    """What Stable Diffusion XL is told of every row's sizes: int [rows, 6], of the original picture (height,
    width), where it was cropped (top, left), and of what is made, each one for all or one each, (height, width) of the
    picture and (0, 0) where nothing is said.

    Raises:
        TypeError, ValueError: no such sizes, or not one for each row.
    """
    said: Mapping[str, tuple[Any, tuple[int, int], int]] = {
        "original_size": (original_size, usual, 1),
        "crops_top_left": (crops_top_left, (0, 0), 0),
        "target_size": (target_size, usual, 1),
    }
    return np.concatenate([_pairs(name, *one, rows) for name, one in said.items()], -1)


def _pairs(name: str, value: Any, usual: tuple[int, int], least: int, rows: int) -> np.ndarray:
    value = usual if value is None else value.tolist() if isinstance(value, np.ndarray) else value
    pairs = list(value) if isinstance(value, list | tuple) else [value]
    if not any(isinstance(pair, list | tuple) for pair in pairs):
        pairs = [pairs] * rows
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"{name}={value!r} should be two whole numbers, or two for each picture")
    if len(pairs) != rows:
        raise ValueError(f"{name} has {len(pairs)} pairs for {rows} pictures; give one for all, or one each")
    return np.array([[whole(name, number, least) for number in pair] for pair in pairs])


def tile_of(vae: AutoencoderKL | None, tiled: Any) -> int | None:
    """The side of a tile, in positions of the state, that is decoded at once; None for the whole picture.

    Args:
        tiled: True for that of the autoencoder's training, a number of pixels, or False.

    Raises:
        TypeError, ValueError: another size than a multiple of what tiles share, or there is nothing that decodes.
    """
    if tiled is False:
        return None
    if vae is None:
        raise ValueError(f"tiled={tiled!r} is of autoencoders, and this checkpoint has none; leave it out")
    config, multiple = vae.config, SHARES * vae.config.factor
    usual = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    pixels = usual if tiled is True else whole("tiled", tiled, 1)
    if pixels % multiple:
        near = max(pixels // multiple, 1) * multiple
        raise ValueError(f"tiled={pixels} is not a multiple of {multiple}; try {near}")
    return pixels // config.factor


def times(size: Sequence[int]) -> str:
    """(height, width) in words."""
    return "x".join(map(str, size))
