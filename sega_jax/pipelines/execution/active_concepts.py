"""Which concepts a model call has to predict: none past its cool-down, and without momentum none before its warm-up."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sega_jax.method.guidance import Edit, Edits


def ordered(rows: Sequence[Sequence[Edit]], momentum_scale: float) -> list[tuple[Edit, ...]]:
    """Each row's edits, the last to end first, and of those the first to begin: so that those that are not needed are
    the last of all rows."""

    def key(edit: Edit) -> tuple[int, int]:
        first, end = (call.item() for call in _window(Edits.stack([[edit]], momentum_scale=momentum_scale)))
        return -end, first

    return [tuple(sorted(row, key=key)) for row in rows]


def needed(edits: Edits, calls: int) -> np.ndarray:
    """How many of the first concepts each call has to predict, int [calls]; no prediction of the others has an effect.

    Args:
        edits: numbers [rows, n], in the order of `ordered` if it is to be few.
    """
    first, end = _window(edits)
    call = np.arange(calls)[:, None, None]
    return np.max(((first <= call) & (call < end)) * np.arange(1, first.shape[1] + 1), (1, 2), initial=0)


def _window(edits: Edits) -> tuple[Any, Any]:
    """The calls from which on, and up to which, the predictions of each concept have an effect.

    A momentum gathers them before the warm-up; after the cool-down it goes on by itself.
    """
    first = np.where(edits.momentum_scale > 0, 0, edits.warmup)
    return first, np.where((edits.weight > 0) & (edits.scale != 0), edits.cooldown, 0)
