"""The measures of an evaluation: the effects of edits on pictures, according to the judge."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sega_jax.demo.attributes import ATTRIBUTES, COLUMN, WORDS
from sega_jax.demo.evaluate.pictures import Pictures

NAMES = list(WORDS)
Measurement = dict[str, Any]  # a row of a table in results.json


class Effect(NamedTuple):
    """The effects of edits, one entry for each picture."""

    success: np.ndarray  # bool: whether all words were added, or all words were removed (see `gone`)
    kept: np.ndarray  # float in [0, 1]: the unchanged fraction of the other attributes visible in both pictures
    distance: np.ndarray  # float in [0, 1]: the mean absolute difference of the pixels


def effect(before: Pictures, after: Pictures, words: Sequence[Sequence[str]], *, removed: bool = False) -> Effect:
    """Compares pictures before and after editing.

    Args:
        words: for each picture, the words that were added, or, with `removed`, the words that were removed.
    """
    success = np.ones(len(words), bool)
    others = before.verdict.seen & after.verdict.seen
    for i, row in enumerate(words):
        one = after[[i]]
        success[i] = all((gone if removed else having)(one, word).item() for word in row)
        others[i, [COLUMN[WORDS[word][0]] for word in row]] = False
    same = before.verdict.attributes == after.verdict.attributes
    difference = np.abs(before.pixels.astype(np.int16) - after.pixels)
    return Effect(
        success,
        (same & others).sum(1) / np.maximum(others.sum(1), 1),
        difference.mean((1, 2, 3)) / 255,
    )


def summary(effects: Effect) -> Measurement:
    """Returns the effects averaged over the pictures, and the 95 % confidence interval of the success rate."""
    n = len(effects.success)
    low, high = interval(int(effects.success.sum()), n)
    averages = {name: float(values.mean()) if n else None for name, values in effects._asdict().items()}
    return {"n": n, "low": low, "high": high} | averages


def lacking(pictures: Pictures, word: str) -> np.ndarray:
    """Returns bool [n]: whether each picture shows the word's attribute with a different value."""
    return pictures.verdict.seen[:, COLUMN[WORDS[word][0]]] & ~having(pictures, word)


def having(pictures: Pictures, word: str) -> np.ndarray:
    """Returns bool [n]: whether the word applies to each picture."""
    return pictures.verdict.words[:, NAMES.index(word)]


def gone(pictures: Pictures, word: str) -> np.ndarray:
    """Returns bool [n]: whether the word was removed from each picture.

    If the attribute may be absent, its value must be "none": replacing glasses with sunglasses, or a beard with a
    moustache, does not count as removal. Otherwise the attribute must be visible and have a different value.
    """
    name, value = WORDS[word]
    values, column = pictures.verdict.attributes[:, COLUMN[name]], COLUMN[name]
    if ATTRIBUTES[name][0] == "none":
        return values == 0
    return pictures.verdict.seen[:, column] & (values != ATTRIBUTES[name].index(value))


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a success rate (Wilson 1927)."""
    if not trials:
        return 0.0, 1.0
    z, share = 1.959964, successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    low, high = ((centre + sign * spread) / (1 + z * z / trials) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)
