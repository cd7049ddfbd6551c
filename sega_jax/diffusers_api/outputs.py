"""Output classes for calls, with the same field names as in diffusers.

A dataclass puts the fields of its last base class first, so the output classes list their bases in reverse order.
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
        images: PIL images, a float array [rows, height, width, 3] in [0, 1], or the final states of the sampling loop.
    """

    images: list[Image.Image | None] | np.ndarray


@dataclasses.dataclass
class Estimates:
    """The predictions and guidance that a call records if `return_guidance` is set. Otherwise all fields are None.

    `*state` is the shape of the latents, of DeepFloyd-IF's pixels, or of Paella's logits, with channels last.

    Attributes:
        sem_guidance: the guidance from the edits at each model call, [calls, rows, *state]. It excludes classifier-free
            guidance and replayed guidance.
        uncond_estimates: the predictions for the negative prompt, [calls, rows, *state].
        text_estimates: the predictions for the prompt, [calls, rows, *state].
        edit_estimates: the predictions for the concepts, [calls, concepts, rows, *state], or None without concepts.
    """

    sem_guidance: np.ndarray | None = None
    uncond_estimates: np.ndarray | None = None
    text_estimates: np.ndarray | None = None
    edit_estimates: np.ndarray | None = None


def estimates(record: Record | None) -> dict[str, Any]:
    """Converts a native record, in which rows are the first axis, to the fields of `Estimates`.

    Args:
        record: the native record; None gives an empty mapping.
    """
    if record is None:
        return {}
    return {
        "sem_guidance": np.moveaxis(record.sem_guidance, 0, 1),
        "uncond_estimates": np.moveaxis(record.uncond, 0, 1),
        "text_estimates": np.moveaxis(record.cond, 0, 1),
        "edit_estimates": None if record.edits is None else np.moveaxis(record.edits, 0, 2),
    }
