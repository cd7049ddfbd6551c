"""Functions that determine which concepts each model call must predict.

A concept need not be predicted once its cool-down is reached or, if it has no momentum, during its warm-up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sega_jax.method.guidance import Edit, Edits


def ordered(rows: Sequence[Sequence[Edit]], momentum_scale: float) -> list[tuple[Edit, ...]]:
    """Sorts the edits of each row so that inactive edits come last.

    Edits that end later come first; edits that end at the same call are sorted by their first call.

    Args:
        rows: The edits of each row.
        momentum_scale: The momentum scale for edits that do not set their own.
    """

    def key(edit: Edit) -> tuple[int, int]:
        first, end = (call.item() for call in _active_calls(Edits.stack([[edit]], momentum_scale=momentum_scale)))
        return -end, first

    return [tuple(sorted(row, key=key)) for row in rows]


def needed(edits: Edits, calls: int) -> np.ndarray:
    """Returns the number of leading concepts that each call must predict; the other concepts have no effect.

    Args:
        edits: The edits of all rows, arrays [rows, n]. Sorting the edits with `ordered` beforehand gives smaller
            numbers.
        calls: The number of model calls.

    Returns:
        int [calls], from 0 to n.
    """
    first, end = _active_calls(edits)
    call = np.arange(calls)[:, None, None]
    return np.max(((first <= call) & (call < end)) * np.arange(1, first.shape[1] + 1), (1, 2), initial=0)


def _active_calls(edits: Edits) -> tuple[Any, Any]:
    """Returns, for each concept, the first call that needs its prediction and the first later call that does not.

    During the warm-up, predictions affect only the momentum. Once the cool-down is reached, they are not used at all.
    """
    first = np.where(edits.momentum_scale > 0, 0, edits.warmup)
    return first, np.where((edits.weight > 0) & (edits.scale != 0), edits.cooldown, 0)
