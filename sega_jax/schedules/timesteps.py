"""Timesteps that are given in place of a number of steps: by hand, or by the name of a list."""

from typing import Any

import numpy as np

# How many timesteps each of the equal sections of the training keeps, from timestep 0 on (Nichol & Dhariwal
# 2021, section 4, as their code writes it): the respacings of DeepFloyd-IF.
NAMED = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20),
    "super27": (1, 1, 1, 1, 1, 1, 1, 2, 5, 13),
    "super40": (2, 2, 2, 2, 2, 2, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}


def given(steps: Any, total: int) -> np.ndarray:
    """The falling timesteps [calls] that `steps` is or names, of `total` of the training; int64.

    Raises:
        TypeError: it is no list of whole numbers.
        ValueError: an unknown name, or one of more timesteps than there are; or timesteps that do not fall or
            are not from 0 to total - 1.
    """
    if isinstance(steps, str):
        if steps not in NAMED:
            raise ValueError(f"steps={steps!r} should be a whole number, or one of {', '.join(NAMED)}")
        array = _sections(NAMED[steps], total)
    else:
        try:
            array = np.asarray(steps)
        except (TypeError, ValueError, RuntimeError):  # ragged lists, and what has no values on the host
            array = np.asarray(None)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise TypeError(
            f"steps={repr(steps)[:80]} should be a whole number, falling timesteps like [999, 500, 0],"
            f" or one of {', '.join(NAMED)}"
        )
    if not 0 <= array.min() <= array.max() < total:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"steps has timestep {wrong}; all should be from 0 to {total - 1}, those of the training")
    array = array.astype(np.int64)
    if (rises := np.flatnonzero(np.diff(array) >= 0)).size:
        before, after = array[rises[0] : rises[0] + 2]
        raise ValueError(f"steps has timestep {after} after {before}; give falling ones, each once")
    return array


def _sections(counts: tuple[int, ...], total: int) -> np.ndarray:
    """Each section from its first timestep to its last; a remainder makes the first sections longer by one."""
    size, longer = divmod(total, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if length < count:
            raise ValueError(f"of {total} timesteps, {length} cannot be {count}; give the timesteps, or their number")
        # Summed up, which decides how halves are rounded.
        strides = np.full(count - 1, (length - 1) / max(count - 1, 1))
        kept.append(start + np.cumsum([0.0, *strides]).round())
        start += length
    return np.concatenate(kept)[::-1].astype(int)
