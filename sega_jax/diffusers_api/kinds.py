"""Kinds of values that only the arguments of diffusers' pipelines take."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sega_jax.diffusers_api.torch_values import is_generator, is_key
from sega_jax.method.argument_kinds import Choice, Integer, Kind, Real
from sega_jax.method.checks import brief, check_float
from sega_jax.systems.call import Seeds


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


class Generators(Kind):
    """Random generators of torch, of which only the seeds are read; or seeds, or a key of JAX."""

    noun = "a seeded generator of torch, a seed, or a list with one for each picture; or a key of JAX"

    def check(self, name: str, value: Any) -> Any:
        if value is None or is_key(value):
            return value
        for one in value if isinstance(value, list | tuple) else [value]:
            seed = isinstance(one, int | np.integer) and not isinstance(one, bool)
            if not (seed or is_generator(one)):
                raise TypeError(f"{name}={brief(value)} should be {self.noun}")
        return value


class SeedsOrGenerators(Seeds):
    """Seeds, or generators in the place that diffusers has for them."""

    def check(self, name: str, value: Any) -> Any:
        several = isinstance(value, list | tuple)
        return value if any(map(is_generator, value if several else [value])) else super().check(name, value)


class OutputType(Choice):
    """Forms of pictures, without torch's tensors."""

    def check(self, name: str, value: Any) -> str:
        if value == "pt":
            raise ValueError(f"{name}='pt' is for tensors of torch; give 'np' for arrays, which are channels last here")
        return super().check(name, value)


class LoraScale(Kind):
    """The scale of LoRAs among diffusers' arguments for attention, which has no others here."""

    noun = "{'scale': number}, which multiplies the weights of loaded LoRAs, or None"

    def check(self, name: str, value: Any) -> dict[str, float] | None:
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping) or set(value) != {"scale"}:
            raise ValueError(f"{name}={brief(value)} is not supported; it should be {self.noun}")
        return {"scale": check_float(f"{name}['scale']", value["scale"])}


class StepCallback(Kind):
    """A function of pipeline, step, timestep and a mapping with the latents."""

    noun = "a function of pipeline, step, timestep and {'latents': array}, which returns the mapping as it is"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        if not callable(value):
            raise TypeError(f"{name}={brief(value)} should be {self.noun}")
        if inputs := [one for one in getattr(value, "tensor_inputs", ()) if one != "latents"]:
            raise ValueError(f"{name}={brief(value)} needs {', '.join(inputs)}, which cannot change during a call")
        return value


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
