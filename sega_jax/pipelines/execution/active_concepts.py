"""Decides which concepts each model call must predict.

No concept needs a prediction after its cool-down, nor, without momentum, before its warm-up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sega_jax.method.guidance import Edit, Edits


def ordered(rows: Sequence[Sequence[Edit]], momentum_scale: float) -> list[tuple[Edit, ...]]:
    """Sorts the edits of each row, so that inactive edits come last.

    Edits that end later come first; of edits that end at the same call, those that begin earlier come first.

    Args:
        rows: the edits of each row.
        momentum_scale: the strength of the momentum, for edits that do not set their own.
    """

    def key(edit: Edit) -> tuple[int, int]:
        first, end = (call.item() for call in _active_calls(Edits.stack([[edit]], momentum_scale=momentum_scale)))
        return -end, first

    return [tuple(sorted(row, key=key)) for row in rows]


def needed(edits: Edits, calls: int) -> np.ndarray:
    """Returns how many concepts, counted from the first, each call must predict; the others have no effect.

    Args:
        edits: the edits of all rows, arrays [rows, n]. The order of `ordered` keeps the numbers small.
        calls: the number of model calls.

    Returns:
        int [calls], from 0 to n.
    """
    first, end = _active_calls(edits)
    call = np.arange(calls)[:, None, None]
    return np.max(((first <= call) & (call < end)) * np.arange(1, first.shape[1] + 1), (1, 2), initial=0)


def _active_calls(edits: Edits) -> tuple[Any, Any]:
    """Returns the first call at which each concept's prediction has an effect, and the first call after the last one.

    The momentum accumulates predictions before the warm-up. After the cool-down it needs no predictions.
    """
    first = np.where(edits.momentum_scale > 0, 0, edits.warmup)
    return first, np.where((edits.weight > 0) & (edits.scale != 0), edits.cooldown, 0)
