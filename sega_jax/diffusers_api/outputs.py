"""The results of calls, by diffusers' names.

A class lists its bases in reverse: the fields of the last base come first.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from sega_jax.systems.base import Record


@dataclasses.dataclass
class Images:
    """The pictures of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1], or the states that sampling ends with.
    """

    images: list[Image.Image | None] | np.ndarray


@dataclasses.dataclass
class Estimates:
    """The record of a call with `return_guidance`; without it all are None.

    The shape of a state is that of the latents, of DeepFloyd-IF's pixels, or of Paella's logits; channels are last.

    Attributes:
        sem_guidance: the guidance that the edits added at each model call, without classifier-free and replayed
            guidance: [calls, rows, *state].
        uncond_estimates: the predictions for the negative prompt: [calls, rows, *state].
        text_estimates: the predictions for the prompt: [calls, rows, *state].
        edit_estimates: the predictions for the concepts: [calls, concepts, rows, *state]; None without concepts.
    """

    sem_guidance: np.ndarray | None = None
    uncond_estimates: np.ndarray | None = None
    text_estimates: np.ndarray | None = None
    edit_estimates: np.ndarray | None = None


def estimates(record: Record | None) -> dict[str, Any]:
    """Returns the fields of `Estimates` for a native record, which has rows before calls."""
    if record is None:
        return {}
    return {
        "sem_guidance": np.moveaxis(record.sem_guidance, 0, 1),
        "uncond_estimates": np.moveaxis(record.uncond, 0, 1),
        "text_estimates": np.moveaxis(record.cond, 0, 1),
        "edit_estimates": None if record.edits is None else np.moveaxis(record.edits, 0, 2),
    }
