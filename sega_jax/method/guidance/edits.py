"""Concepts and how each of them guides: `Edit` for one, `Edits` for the arrays of a batch."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sega_jax.method.numerics import floating

# The step count at which "never" happens.
NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Edit:
    """One concept and how it guides.

    Attributes:
        concept: the words, or their embedding as a [tokens, channels] array.
        scale: s_k, the strength; negative removes the concept. People use 4 to 10.
        threshold: lambda_k in [0, 1], the share of each channel that stays untouched.
        warmup: delta_k >= 0, the model call at which the concept begins to act.
        cooldown: kappa_k >= 0, the call from which on it no longer does; None is never.
        weight: w_k >= 0, against the other concepts.
        momentum_scale: s_m in [0, 1]; None takes the call's.
        momentum_beta: beta in [0, 1]; None takes the call's.

    Raises:
        TypeError, ValueError: a setting of another type or out of its range.
    """

    concept: Any
    scale: float = 5.0
    threshold: float = 0.9
    warmup: int = 10
    cooldown: int | None = None
    weight: float = 1.0
    momentum_scale: float | None = None
    momentum_beta: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.concept, str):
            embedding = floating("Edit: concept", self.concept, "(tokens, channels), or words")
            if embedding.ndim != 2:
                raise ValueError(f"Edit: concept has shape {embedding.shape}, expected (tokens, channels)")
            object.__setattr__(self, "concept", embedding)
        self._number("scale", -math.inf, math.inf, "a finite number; negative removes the concept")
        self._number("threshold", 0, 1, "in [0, 1], the share of the picture that stays untouched")
        self._count("warmup", 0)
        if self.cooldown is not None:
            self._count("cooldown", 0)
        self._number("weight", 0, math.inf, "at least 0; to remove a concept give a negative scale")
        if self.momentum_scale is not None:
            self._number("momentum_scale", 0, 1, "in [0, 1], or None for the call's")
        if self.momentum_beta is not None:
            self._number("momentum_beta", 0, 1, "in [0, 1], or None for the call's")

    def _number(self, name: str, low: float, high: float, expected: str) -> None:
        value = getattr(self, name)
        where = f"Edit {_brief(self.concept)}: {name}={value!r}"
        if isinstance(value, bool) or not isinstance(value, numbers.Real | np.number):
            raise TypeError(f"{where} should be a number {expected}")
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{where} should be {expected}")
        object.__setattr__(self, name, float(value))

    def _count(self, name: str, low: int) -> None:
        value = getattr(self, name)
        where = f"Edit {_brief(self.concept)}: {name}={value!r}"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{where} should be a whole number of model calls")
        if not low <= value <= NEVER:
            raise ValueError(f"{where} should be at least {low}")
        object.__setattr__(self, name, int(value))


def _brief(concept: Any) -> str:
    return repr(concept) if isinstance(concept, str) else f"<{type(concept).__name__}>"


class Edits(NamedTuple):
    """The settings of `Edit` as arrays, every one [batch, n] (or what broadcasts to it)."""

    scale: Any  # float
    threshold: Any  # float in [0, 1]
    warmup: Any  # int32
    cooldown: Any  # int32, NEVER for none
    weight: Any  # float
    momentum_scale: Any  # float
    momentum_beta: Any  # float

    @classmethod
    def stack(
        cls,
        rows: Sequence[Sequence[Edit]],
        *,
        n: int | None = None,
        momentum_scale: float = 0.1,
        momentum_beta: float = 0.4,
    ) -> "Edits":
        """Host arrays [rows, n] from each row's edits; TypeError or ValueError for what is none.

        A row with fewer is padded by concepts of weight 0 *and warm-up 0*: with another warm-up the
        gate that waits for all concepts would wait for one that does not exist.
        """
        if isinstance(rows, Edit) or not all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
            raise TypeError("Edits.stack takes a list of edits for each row, as in [[Edit('glasses')], []]")
        if not all(isinstance(edit, Edit) for row in rows for edit in row):
            raise TypeError("Edits.stack takes Edits, with words inside: Edit('glasses')")
        n = max((len(row) for row in rows), default=0) if n is None else n
        if any(len(row) > n for row in rows):
            raise ValueError(f"a row has more edits than n={n}")
        shape = (len(rows), n)
        arrays = cls(
            scale=np.zeros(shape),
            threshold=np.zeros(shape),
            warmup=np.zeros(shape, np.int32),
            cooldown=np.full(shape, NEVER, np.int32),
            weight=np.zeros(shape),
            momentum_scale=np.full(shape, float(momentum_scale)),
            momentum_beta=np.full(shape, float(momentum_beta)),
        )
        for r, row in enumerate(rows):
            for k, edit in enumerate(row):
                for name, array in arrays._asdict().items():
                    if (value := getattr(edit, name)) is not None:
                        array[r, k] = value
        return arrays
