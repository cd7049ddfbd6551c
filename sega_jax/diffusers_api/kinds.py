"""Kinds of values that only the arguments of diffusers' pipelines take."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from sega_jax.method.argument_kinds import Integer, Kind, Real
from sega_jax.method.checks import brief


@dataclasses.dataclass(frozen=True)
class OrNone(Kind):
    """Values of another kind, or None."""

    of: Kind

    @property
    def noun(self) -> str:
        return f"{self.of.noun}, or None"

    def check(self, name: str, value: Any) -> Any:
        return None if value is None else self.of.check(name, value)

    def several(self, value: Any) -> bool:
        return self.of.several(value)


@dataclasses.dataclass(frozen=True)
class PerConcept(Kind):
    """One value for all concepts, or a sequence with one for each; None is the default."""

    of: Kind

    @property
    def noun(self) -> str:
        return f"{self.of.noun}, or a sequence with one for each concept; None is the default"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray | jax.Array):
            value = value.tolist()
        if isinstance(value, list | tuple):
            return [None if entry is None else self.of.check(name, entry) for entry in value]
        return None if value is None else self.of.check(name, value)


class ModelCalls(Integer):
    """Numbers of model calls; fractions are rounded up, since call 11 is the first one after 10.5."""

    def check(self, name: str, value: Any) -> int:
        if isinstance(value, float) and math.isfinite(value):
            value = math.ceil(value)
        return super().check(name, value)


class Weight(Real):
    """Weights of concepts."""

    def check(self, name: str, value: Any) -> float:
        try:
            return super().check(name, value)
        except ValueError as error:
            raise ValueError(f"{error}; to remove a concept, set reverse_editing_direction") from None


class ConceptWords(Kind):
    """Words of one or several concepts, as a list."""

    noun = "words, or a list of them"

    def check(self, name: str, value: Any) -> list[str]:
        words = [value] if isinstance(value, str) and value else value
        if not words:
            return []
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"{name}={words!r} should be words or a list of them")
        return list(words)


class TorchGenerator(Kind):
    """The random generator of torch, which these pipelines cannot use."""

    def check(self, name: str, value: Any) -> None:
        if value is not None:
            raise TypeError(f"{name} is torch's; give seed=, one number or one for each picture, or a JAX key=")


@dataclasses.dataclass(frozen=True)
class Unsupported(Kind):
    """An argument of diffusers that is not supported: only values that change nothing in diffusers are accepted."""

    remedy: str
    harmless: tuple[Any, ...] = ()  # accepted values besides None

    @property
    def noun(self) -> str:
        return self.remedy

    def check(self, name: str, value: Any) -> Any:
        if value is not None and not any(isinstance(value, type(one)) and value == one for one in self.harmless):
            raise ValueError(f"{name}={brief(value)} is not supported; {self.remedy}")
        return value
