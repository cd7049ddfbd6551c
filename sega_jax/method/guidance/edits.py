"""Concepts and how each of them guides: `Edit` for one, `Edits` for the arrays of a batch."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.method.argument_kinds import Integer, Kind, Real
from sega_jax.method.arguments import argument, arguments, required
from sega_jax.method.checks import brief, is_sequence
from sega_jax.method.numerics import floating

# The step count at which "never" happens.
NEVER = np.iinfo(np.int32).max


class Concept(Kind):
    """Words, or text conditioning of one row, or an array [tokens, channels]."""

    noun = "words, or their conditioning"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, str):
            return value
        leaves = jax.tree.leaves(value)
        if not hasattr(value, "ndim") and leaves and all(hasattr(leaf, "ndim") for leaf in leaves):
            return value
        embedding = floating(name, value, "(tokens, channels), or words")
        if embedding.ndim != 2:
            raise ValueError(f"{name} has shape {embedding.shape}, expected (tokens, channels)")
        return embedding


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """One concept and how it guides. Edits of equal settings and words, or of equal arrays, are equal.

    Attributes:
        concept: words, or their text conditioning, of one row (`pipe.encode`); for families with one text encoder an
            array [tokens, channels] may stand in its place.
        scale: s_k, the strength; negative removes the concept. People use 4 to 10.
        threshold: lambda_k in [0, 1], the share of each channel that stays untouched.
        warmup: delta_k >= 0, the model call at which the concept begins to act.
        cooldown: kappa_k >= 0, the call from which on it no longer acts; None is never.
        weight: w_k >= 0, against the other concepts.
        momentum_scale: s_m in [0, 1]; None takes the call's.
        momentum_beta: beta in [0, 1]; None takes the call's.

    Raises:
        TypeError, ValueError: a setting of another type or out of its range.
    """

    concept: Any = dataclasses.field(metadata=required(Concept(), "the words"))
    scale: float = argument(
        5.0, Real(hint="negative removes the concept"), "the strength; negative removes the concept"
    )
    threshold: float = argument(0.9, Real(0, 1), "the share of each channel that stays untouched")
    warmup: int = argument(10, Integer(0, NEVER), "the model call at which it begins to act", unit="model calls")
    cooldown: int | None = argument(
        None, Integer(0, NEVER), "the call from which on it no longer acts; None is never", unit="model calls"
    )
    weight: float = argument(
        1.0, Real(0, hint="to remove a concept give a negative scale"), "against the other concepts"
    )
    momentum_scale: float | None = argument(None, Real(0, 1, "None takes the call's"), "s_m; None takes the call's")
    momentum_beta: float | None = argument(None, Real(0, 1, "None takes the call's"), "beta; None takes the call's")

    def __post_init__(self) -> None:
        object.__setattr__(self, "concept", Concept().check("Edit: concept", self.concept))
        for name, one in arguments(Edit).items():
            if name != "concept":
                value = one.check(getattr(self, name), f"Edit {_brief(self.concept)}: {name}")
                object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        settings = all(getattr(self, name) == getattr(other, name) for name in SETTINGS)
        return settings and _same(self.concept, other.concept)

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self.concept)
        concept = self.concept if isinstance(self.concept, str) else (structure, *map(np.shape, leaves))
        return hash((concept, *(getattr(self, name) for name in SETTINGS)))


def _same(one: Any, other: Any) -> bool:
    """Tells whether two concepts are the same words or equal arrays."""
    if jax.tree.structure(one) != jax.tree.structure(other):  # type: ignore[operator]
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b or np.array_equal(a, b) for a, b in pairs)


SETTINGS = tuple(name for name in arguments(Edit) if name != "concept")


def _brief(concept: Any) -> str:
    return brief(concept) if isinstance(concept, str) else f"<{type(concept).__name__}>"


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
        if isinstance(rows, Edit) or not all(map(is_sequence, rows)):
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
