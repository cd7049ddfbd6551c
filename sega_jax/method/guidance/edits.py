"""The settings of concepts: `Edit` holds one concept's settings, and `Edits` holds a batch's settings as arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.method.argument_kinds import Integer, Kind, Real
from sega_jax.method.arguments import argument, arguments, required
from sega_jax.method.checks import brief, is_sequence
from sega_jax.method.numerics import floating

# Sentinel for "never", larger than any number of model calls.
NEVER = np.iinfo(np.int32).max
# The values for edits that have None in these settings, if the checkpoint recommends none.
THRESHOLD, WARMUP = 0.9, 10


class Concept(Kind):
    """Concepts, each given as a string, as the text conditioning of one row, or as an array [tokens, channels]."""

    noun = "a string, or its text conditioning"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, str):
            return value
        leaves = jax.tree.leaves(value)
        if not hasattr(value, "ndim") and leaves and all(hasattr(leaf, "ndim") for leaf in leaves):
            return value
        embedding = floating(name, value, "(tokens, channels), or a string")
        if embedding.ndim != 2:
            raise ValueError(f"{name} has shape {embedding.shape}, expected (tokens, channels)")
        return embedding


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """The settings of one concept, in the notation of the paper (section 3).

    Two edits are equal if their settings are equal and their concepts are equal strings or equal arrays.

    Attributes:
        concept: A string, or the text conditioning of one row as `pipe.encode` returns it. Families with one text
            encoder also accept an array [tokens, channels].
        scale: s_k, the strength. A negative scale removes the concept. Typical values range from 4 to 10.
        threshold: lambda_k in [0, 1], the share of each channel that the edit leaves unchanged. None uses the value
            that the checkpoint recommends, or 0.9 if it recommends none.
        warmup: delta_k >= 0, the model call at which the concept begins to act, counted from 0. None uses the value
            that the checkpoint recommends, or 10 if it recommends none.
        cooldown: kappa_k >= 0, the first model call at which the concept no longer acts; None means never.
        weight: w_k >= 0, the weight relative to the other concepts.
        momentum_scale: s_m in [0, 1]; None uses the call's value (in `Edits.stack`, the argument of the same name).
        momentum_beta: beta in [0, 1]; None uses the call's value (in `Edits.stack`, the argument of the same name).

    Raises:
        TypeError, ValueError: A setting has the wrong type or is out of range.

    Example:
        >>> from sega_jax import Edit
        >>> edit = Edit("glasses", scale=-4, warmup=5, cooldown=30)
        >>> edit.warmup, edit.cooldown
        (5, 30)
        >>> Edit("glasses", threshold=2)
        Traceback (most recent call last):
        ValueError: Edit 'glasses': threshold=2 should be a number in [0, 1]
    """

    concept: Any = dataclasses.field(metadata=required(Concept(), "the concept to add or remove"))
    scale: float = argument(
        5.0,
        Real(hint="a negative scale removes the concept"),
        "the strength; a negative scale removes the concept",
        shell_help="the strength; write a minus before the concept to remove it",
    )
    threshold: float | None = argument(
        None,
        Real(0, 1),
        "the share of each channel that the edit leaves unchanged; None uses the checkpoint's recommendation, or 0.9",
        shell_help="the share of each channel that the edit leaves unchanged",
    )
    warmup: int | None = argument(
        None,
        Integer(0, NEVER),
        "the model call at which the concept begins to act; None uses the checkpoint's recommendation, or 10",
        unit="model calls",
        shell_help="the model call at which the concept begins to act; most schedulers make one call in each step",
    )
    cooldown: int | None = argument(
        None,
        Integer(0, NEVER),
        "the first model call at which the concept no longer acts; None means never",
        shell_help="the first model call at which the concept no longer acts",
        unit="model calls",
    )
    weight: float = argument(
        1.0,
        Real(0, hint="to remove a concept, use a negative scale"),
        "the weight relative to the other concepts",
    )
    momentum_scale: float | None = argument(
        None,
        Real(0, 1, "leave it out to use the call's value"),
        "the scale of the momentum, s_m; None uses the call's value",
        shell_help="how much of the edit's earlier effect is added at every model call",
    )
    momentum_beta: float | None = argument(
        None,
        Real(0, 1, "leave it out to use the call's value"),
        "the decay of the momentum, beta; None uses the call's value",
        shell_help="how slowly this earlier effect changes",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "concept", Concept().check("Edit: concept", self.concept))
        for name, spec in arguments(Edit).items():
            if name != "concept":
                value = spec.check(getattr(self, name), f"Edit {_brief(self.concept)}: {name}")
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
    """Returns whether two concepts are equal strings or equal arrays."""
    if jax.tree.structure(one) != jax.tree.structure(other):  # type: ignore[operator]
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b or np.array_equal(a, b) for a, b in pairs)


def warmup_of(edit: Edit) -> int:
    """Returns the warm-up of an edit that the settings of a checkpoint have completed."""
    assert edit.warmup is not None
    return edit.warmup


SETTINGS = tuple(name for name in arguments(Edit) if name != "concept")


def _brief(concept: Any) -> str:
    return brief(concept) if isinstance(concept, str) else f"<{type(concept).__name__}>"


class Edits(NamedTuple):
    """The settings of `Edit` as arrays that broadcast to [batch, n], for `sega`.

    If the settings are an argument of a jitted function, new values do not cause recompilation. If the function only
    closes over the settings, they are compiled into its program as constants.

    Example:
        >>> from sega_jax import Edit, Edits
        >>> edits = Edits.stack([[Edit("glasses"), Edit("smile", warmup=5)], [Edit("hat")]])
        >>> edits.warmup.tolist()
        [[10, 5], [10, 0]]
    """

    scale: Any  # float
    threshold: Any  # float in [0, 1]
    warmup: Any  # int32
    cooldown: Any  # int32; NEVER for a concept without a cool-down
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
        """Returns the settings of each row's edits as host arrays [rows, n].

        Shorter rows are padded with concepts of weight 0 *and warm-up 0*. With the "diffusers" semantics, the guidance
        changes once all concepts are warm, and padding must not delay this.

        Args:
            rows: A list with one list of edits for each row.
            n: The number of concepts in each row; None uses the length of the longest row.
            momentum_scale, momentum_beta: Values in [0, 1] for edits that have None in these settings. A threshold of
                None is 0.9, and a warm-up of None is 10.

        Raises:
            TypeError: `rows` is not a list of lists of edits.
            ValueError: A row has more than n edits.
        """
        if isinstance(rows, Edit) or not all(map(is_sequence, rows)):
            raise TypeError("Edits.stack takes a list of edits for each row, as in [[Edit('glasses')], []]")
        if not all(isinstance(edit, Edit) for row in rows for edit in row):
            raise TypeError("Edits.stack takes lists of Edit objects, as in [[Edit('glasses')], []]")
        n = max((len(row) for row in rows), default=0) if n is None else n
        if any(len(row) > n for row in rows):
            raise ValueError(
                f"a row has more edits than n={n}; give a larger n, or None for the length of the longest row"
            )
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
        defaults = {
            "threshold": THRESHOLD,
            "warmup": WARMUP,
            "cooldown": NEVER,
            "momentum_scale": momentum_scale,
            "momentum_beta": momentum_beta,
        }
        for r, row in enumerate(rows):
            for k, edit in enumerate(row):
                for name, array in arrays._asdict().items():
                    value = getattr(edit, name)
                    array[r, k] = defaults[name] if value is None else value
        return arrays
