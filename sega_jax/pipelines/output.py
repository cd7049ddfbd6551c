"""What a call of a pipeline gives."""

import dataclasses

import numpy as np
from PIL import Image

from sega_jax.systems.base import Record


def is_whole(states: np.ndarray) -> np.ndarray:
    """Whether each row of latents is finite, or of tokens has none of -1; bool [rows]."""
    entries = np.isfinite(states) & (states > -1 if states.dtype.kind == "i" else True)
    return entries.reshape(len(states), -1).all(1)


@dataclasses.dataclass
class Output:
    """What a call made, one entry per picture, prompt by prompt.

    Attributes:
        images: PIL pictures; uint8 or float32 arrays [pictures, height, width, 3] (floats in [0, 1]); or
            latents [pictures, height / f, width / f, channels] in float32, which for DeepFloyd-IF are pixels in
            [-1, 1]; or Paella's tokens [pictures, height / f, width / f] in int32. A picture that is not finite is
            None, black, NaN, or of tokens -1; one that is flagged is black.
        finite: bool [pictures], False where NaN or infinity came up; a warning said so, too.
        seeds: the integer seed of each picture; None where a key was given.
        record: with `record=True` every call's predictions and semantic guidance, arrays
            [pictures, calls, ...]; else None. With `record_noise=True` its `noise` is what the solver drew, [calls,
            pictures, ...], as `noise=` takes it.
        flagged: bool [pictures], True where the safety checker found what it looks for; a warning said so, too.
            None where the pipeline has no safety checker, and for latents, which are not checked.
    """

    images: list[Image.Image | None] | np.ndarray
    finite: np.ndarray
    seeds: list[int] | None
    record: Record | None = None
    flagged: np.ndarray | None = None
