"""The output of a pipeline call."""

import dataclasses

import numpy as np
from PIL import Image

from sega_jax.systems.base import Record


def is_finite(states: np.ndarray) -> np.ndarray:
    """Returns bool [rows]: for latents, whether each row is finite; for tokens, whether each row is free of -1."""
    entries = np.isfinite(states) & (states > -1 if states.dtype.kind == "i" else True)
    return entries.reshape(len(states), -1).all(1)


@dataclasses.dataclass
class Output:
    """The pictures of a call, and information about them. The first prompt's pictures come first.

    Attributes:
        images: One entry for each picture, in the form that the argument `output` selects: a list of Pillow images; a
            uint8 or float32 array [pictures, height, width, 3], with floats in [0, 1]; float32 latents [pictures,
            height / f, width / f, channels], which are pixels in [-1, 1] for DeepFloyd-IF; or Paella's int32 tokens
            [pictures, height / f, width / f]. Here, f is the checkpoint's downsampling factor. A picture that is not
            finite is replaced with None (Pillow), black (uint8), NaN (floats) or -1 (tokens). A flagged picture is
            black.
        finite: bool [pictures], False for pictures with NaN or infinite values; the call also warns about these.
        seeds: The integer seed of each picture; None if the call was given a key instead.
        record: With `record=True`, the predictions and semantic guidance of every model call, as arrays [pictures,
            calls, ...]; otherwise None. With `record_noise=True`, `record.noise` is the noise that the solver drew,
            [calls, pictures, ...], in the form that the argument `noise` accepts.
        flagged: bool [pictures], True for pictures that the safety checker flagged; the call also warns about these.
            None if the pipeline has no safety checker, and for latents and tokens, which are not checked.

    Example:
        >>> import sega_jax
        >>> pipe = sega_jax.load()
        >>> out = pipe("a face", images_per_prompt=2, steps=2, output="uint8", progress=False)
        >>> out.images.shape, out.images.dtype.name
        ((2, 128, 128, 3), 'uint8')
        >>> out.seeds, out.finite.tolist()
        ([0, 1], [True, True])
    """

    images: list[Image.Image | None] | np.ndarray
    finite: np.ndarray
    seeds: list[int] | None
    record: Record | None = None
    flagged: np.ndarray | None = None
