"""Reads the results of torch and diffusers that `reference/record.py` recorded, and compares ours with them."""

from functools import cache
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).parents[1] / "reference"


@cache
def recorded(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def same_pixels(ours, theirs):
    """Returns whether normalised pixels agree within one grey level, since versions of Pillow round differently."""
    return ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1.01 / 255 / 0.26
