"""Kinds of argument values that are used only by the pipelines with diffusers' interface."""

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
    """None, or a value of the kind that is given as `of`."""

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
    """One value for all concepts, or a sequence with one value for each; None means the default."""

    of: Kind

    @property
    def noun(self) -> str:
        return f"{self.of.noun}, or a sequence with one value for each concept; None means the default"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray | jax.Array):
            value = value.tolist()
        if isinstance(value, list | tuple):
            return [None if entry is None else self.of.check(name, entry) for entry in value]
        return None if value is None else self.of.check(name, value)


class ModelCalls(Integer):
    """Indices of model calls. Fractions are rounded up: 10.5 means call 11."""

    def check(self, name: str, value: Any) -> int:
        if isinstance(value, float) and math.isfinite(value):
            value = math.ceil(value)
        return super().check(name, value)


class Weight(Real):
    """Relative weights of concepts. They cannot be negative."""

    def check(self, name: str, value: Any) -> float:
        try:
            return super().check(name, value)
        except ValueError as error:
            raise ValueError(f"{error}; to remove a concept, set reverse_editing_direction=True") from None


class ConceptWords(Kind):
    """One or more concepts as strings. `check` always returns a list."""

    noun = "a string or a list of strings"

    def check(self, name: str, value: Any) -> list[str]:
        words = [value] if isinstance(value, str) and value else value
        if not words:
            return []
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"{name}={words!r} should be a string or a list of strings")
        return list(words)


class Generators(Kind):
    """Seeded torch generators (only their seeds are used), seeds, or a JAX key."""

    noun = "a seeded torch generator, a seed, a list with one of these for each picture, or a JAX key"

    def check(self, name: str, value: Any) -> Any:
        if value is None or is_key(value):
            return value
        for one in value if isinstance(value, list | tuple) else [value]:
            seed = isinstance(one, int | np.integer) and not isinstance(one, bool)
            if not (seed or is_generator(one)):
                raise TypeError(f"{name}={brief(value)} should be {self.noun}")
        return value


class SeedsOrGenerators(Seeds):
    """Seeds or generators. Generators are accepted because this position belongs to `generator` in diffusers."""

    def check(self, name: str, value: Any) -> Any:
        several = isinstance(value, list | tuple)
        return value if any(map(is_generator, value if several else [value])) else super().check(name, value)


class OutputType(Choice):
    """Output formats. diffusers' "pt" (torch tensors) is not supported."""

    def check(self, name: str, value: Any) -> str:
        if value == "pt":
            raise ValueError(f"{name}='pt' (torch tensors) is not supported; use 'np' for arrays with channels last")
        return super().check(name, value)


class LoraScale(Kind):
    """The LoRA scale in `cross_attention_kwargs`. diffusers' other entries are not supported."""

    noun = "None, or {'scale': number} to multiply the weights of loaded LoRAs"

    def check(self, name: str, value: Any) -> dict[str, float] | None:
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping) or set(value) != {"scale"}:
            raise ValueError(f"{name}={brief(value)} is not supported; it should be {self.noun}")
        return {"scale": check_float(f"{name}['scale']", value["scale"])}


class StepCallback(Kind):
    """A function of the pipeline, the step, the timestep and a mapping that contains the latents."""

    noun = "a function of (pipe, step, timestep, {'latents': array}) that returns the mapping unchanged"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        if not callable(value):
            raise TypeError(f"{name}={brief(value)} should be {self.noun}")
        if inputs := [tensor for tensor in getattr(value, "tensor_inputs", ()) if tensor != "latents"]:
            raise ValueError(f"{name}={brief(value)} needs {', '.join(inputs)}, but callbacks receive only the latents")
        return value


@dataclasses.dataclass(frozen=True)
class Unsupported(Kind):
    """Values of an unsupported argument. Only values that have no effect in diffusers are accepted.

    Attributes:
        remedy: the end of the error message, which gives the reason or the remedy.
        harmless: the values that are accepted in addition to None.
    """

    remedy: str
    harmless: tuple[Any, ...] = ()

    @property
    def noun(self) -> str:
        return self.remedy

    def check(self, name: str, value: Any) -> Any:
        if value is not None and not any(isinstance(value, type(one)) and value == one for one in self.harmless):
            raise ValueError(f"{name}={brief(value)} is not supported; {self.remedy}")
        return value
