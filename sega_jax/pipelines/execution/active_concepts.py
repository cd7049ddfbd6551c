"""The choice of the concepts that each model call must predict.

A concept needs no predictions after its cool-down. Without momentum, it needs none before its warm-up either.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sega_jax.method.guidance import Edit, Edits


def ordered(rows: Sequence[Sequence[Edit]], momentum_scale: float) -> list[tuple[Edit, ...]]:
    """Sorts the edits of each row so that inactive edits come last.

    Edits that end later come first. Among edits that end at the same call, those that begin earlier come first.

    Args:
        rows: The edits of each row.
        momentum_scale: The momentum scale of edits that do not set one.
    """

    def key(edit: Edit) -> tuple[int, int]:
        first, end = (call.item() for call in _active_calls(Edits.stack([[edit]], momentum_scale=momentum_scale)))
        return -end, first

    return [tuple(sorted(row, key=key)) for row in rows]


def needed(edits: Edits, calls: int) -> np.ndarray:
    """Returns the number of leading concepts that each call must predict; the others have no effect.

    Args:
        edits: The edits of all rows, arrays [rows, n]. The numbers are smaller if `ordered` sorted the edits.
        calls: The number of model calls.

    Returns:
        int [calls], from 0 to n.
    """
    first, end = _active_calls(edits)
    call = np.arange(calls)[:, None, None]
    return np.max(((first <= call) & (call < end)) * np.arange(1, first.shape[1] + 1), (1, 2), initial=0)


def _active_calls(edits: Edits) -> tuple[Any, Any]:
    """Returns the range of calls at which each concept's prediction has an effect: the first call, and the end.

    Before the warm-up, predictions count only for the momentum. After the cool-down, nothing uses them.
    """
    first = np.where(edits.momentum_scale > 0, 0, edits.warmup)
    return first, np.where((edits.weight > 0) & (edits.scale != 0), edits.cooldown, 0)
