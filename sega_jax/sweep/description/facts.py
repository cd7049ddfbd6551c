"""The facts that planning needs about a sweep's checkpoint, or about each stage of a cascade. They can be read without
the weights.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from sega_jax.method.schedules import Scheduler
from sega_jax.pipelines import loading, sources
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.adapters import lora_changes
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.components import as_scheduler
from sega_jax.pipelines.messages import muted
from sega_jax.pipelines.recommended import Recommended
from sega_jax.sweep.description import stages
from sega_jax.sweep.description.fields import call_settings
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.systems.base import Sizes, System
from sega_jax.systems.images import Pictures
from sega_jax.systems.registry import CHECKER, named
from sega_jax.text.files import CheckpointError


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a checkpoint that planning needs, read without its weights. All of them are JSON-compatible.

    Attributes:
        model: arguments of `sega_jax.load`, including the folder's absolute path or the commit on the hub.
        system: the name of the family.
        scheduler: the scheduler's config; None for a family that has its own schedule.
        sizes: the picture sizes that the model supports.
        negative: the text that is equivalent to a missing negative prompt; None if there is no such text.
        stage: the stage's name in its cascade; None for a single model.
        earlier: the facts about the previous stage, whose pictures this stage enlarges; None for the first stage.
        recommended: the settings that the checkpoint recommends.

    Example:
        >>> from sega_jax import sweep
        >>> facts = sweep.Facts.of(sweep.Sweep(call={"prompt": "a portrait"}))
        >>> facts.system, facts.sizes.default
        ('stable_diffusion', (128, 128))
    """

    model: Mapping[str, Any]
    system: str
    scheduler: Mapping[str, Any] | None
    sizes: Sizes
    negative: str | None = ""
    stage: str | None = None
    earlier: "Facts | None" = None
    recommended: Recommended = dataclasses.field(default_factory=Recommended)

    @classmethod
    def of(cls, sweep: Sweep) -> "Facts":
        """Returns the facts about a sweep's model; for a cascade, the facts about its last stage.

        Downloads missing files if the model is on the hub.

        Raises:
            FileNotFoundError, CheckpointError: as for `sega_jax.load`; or the cascade lacks a stage that the sweep
                names.
            ValueError: a setting belongs to a stage that the sweep does not have.
        """
        names = stages.later_stages()
        later = {name: model for name, model in sweep.model.items() if name in names}
        model = {name: value for name, value in sweep.model.items() if name not in names}
        if not later:
            _check_stages(sweep, [])
            return cls._of(model)
        # Check the model_index.json of all stages before downloading weights, which may take hours.
        first = _source(model).system
        systems = _later_systems(first, later)
        _check_stages(sweep, [FIRST, *systems])
        facts = cls._of({**model, "safety_checker": False}, FIRST)
        common = {name: value for name, value in model.items() if name not in ("source", "revision")}
        for name, system in systems.items():
            shares = system.text.type is first.text.type
            options = {**common, **later[name], **({"safety_checker": False} if shares else {})}
            facts = cls._of(options, name, facts)
        return facts

    @classmethod
    def _of(cls, model: dict[str, Any], stage: str | None = None, earlier: "Facts | None" = None) -> "Facts":
        readers = None if earlier is None else _readers(earlier.first)
        source = _source(model)
        description = _described(model, "xla", readers)
        if "source" in model:
            place, commit = sources.place(source)
            model |= {"source": place} | ({} if commit is None else {"revision": commit})
        scheduler = None if description.scheduler is None else description.scheduler.config
        sizes = description.system.sampler.sizes(description.models)
        reader = description.system.text
        negative = reader.negative(description.models, description.tokenizer, description.extras)
        negative = negative if isinstance(negative, str) else None
        system, recommended = description.system.name, description.recommended
        return cls(model, system, scheduler, sizes, negative, stage, earlier, recommended)

    @property
    def family(self) -> System:
        """The checkpoint's family."""
        return named(self.system)

    @property
    def chain(self) -> "list[Facts]":
        """The facts about all stages up to this one, starting with the first stage."""
        return [*(self.earlier.chain if self.earlier is not None else []), self]

    @property
    def first(self) -> "Facts":
        """The facts about the first stage."""
        return self.chain[0]

    @property
    def prefix(self) -> str:
        """The prefix of this stage's settings, such as "stage2."; empty for the first stage."""
        return "" if self.earlier is None else f"{self.stage}."

    @property
    def shares_text(self) -> bool:
        """Whether the first stage's text encoder also encodes this stage's prompts."""
        return self.earlier is not None and self.family.text.type is self.first.family.text.type

    @property
    def declaration(self) -> Any:
        """The dataclass that declares the arguments of the family's calls."""
        return self.family.call

    def scheduler_of(self, name: str | None) -> Scheduler | None:
        """Returns the checkpoint's scheduler, or the named scheduler with the checkpoint's options.

        Raises:
            ValueError: the scheduler does not support an option, or the family has its own schedule.
        """
        if self._config is None:
            if name is not None:
                raise ValueError(f"scheduler={name!r}: {self.family.title} has its own schedule; leave scheduler out")
            return None
        return _scheduler(self._config, name)

    def calls(self, point: Any) -> int:
        """Returns the number of model calls for one picture."""
        return _calls(self, self.declaration, point.scheduler, point.outline)

    def static(self, point: Any) -> Any:
        """Returns the family's static settings for a picture, which are compiled into its program."""
        return _static(self, self.declaration, point.scheduler, point.outline)

    @cached_property
    def _config(self) -> str | None:
        return None if self.scheduler is None else json.dumps(dict(self.scheduler))

    def __hash__(self) -> int:
        return hash((self.system, self._config))


def _check_stages(sweep: Sweep, existing: list[str | None]) -> None:
    """Checks that the sweep has the stages that its settings name.

    Args:
        existing: the names of the cascade's stages; empty for a single model.

    Raises:
        ValueError: a stage does not exist.
    """
    keys = {stages.split(key)[0]: key for key in (*sweep.call, *sweep.axes)}
    guided = [sweep.call.get("edited", ()), *(one for block in sweep.blocks for one in block.axes.get("edited", ()))]
    keys |= {stage: "edited" for one in guided for stage in one}
    if not existing and "edited" in (*sweep.call, *sweep.axes):
        raise ValueError(
            "'edited' is only for cascades, where it lists the stages that the edits guide, but this sweep has a"
            " single model; remove 'edited'"
        )
    for stage, key in keys.items():
        if stage and stage not in existing:
            raise ValueError(f"{key!r} needs {stage}, which is missing; add its checkpoint to [model] as {stage}")


def _later_systems(first: System, later: Mapping[str, Mapping[str, Any]]) -> dict[str, System]:
    """Returns the families of a cascade's later stages, in order.

    Raises:
        CheckpointError: the cascade has no such stage, or a stage before it is missing.
    """
    for name in later:
        if name not in first.stages:
            raise CheckpointError(
                f"model: {first.title} is not the first stage of a cascade with {name}; remove {name}"
            )
    order = list(first.stages)
    for i, name in enumerate(order[: max(map(order.index, later)) + 1]):
        if name not in later:
            after = next(other for other in order[i:] if other in later)
            raise CheckpointError(f"model: {after} enlarges the pictures of {name}, which is missing; add {name}")
        source, expected = _source(later[name]), first.stages[name]
        if source.system is not expected:
            checkpoint = str(source.name)
            raise CheckpointError(
                f"model: {name}={checkpoint!r} is a checkpoint of {source.system.title}; give a checkpoint of"
                f" {expected.title}"
            )
    return {name: system for name, system in first.stages.items() if name in later}


@lru_cache
def changes_text(facts: Facts, adapters: tuple[tuple[str, Pairs], ...], files: tuple[tuple[str, str], ...]) -> bool:
    """Returns whether LoRAs change a checkpoint's text encoders.

    Args:
        adapters: (kind, (file, value) pairs) for each kind of adapter ("lora", "textual_inversion").
        files: (path, SHA-256) of each file. The hashes are part of the cache's key, so a changed file is read again.

    Raises:
        CheckpointError: a file does not fit the checkpoint.
    """
    del files
    loras = dict(adapters).get("lora")
    if not loras:
        return False
    description = described(facts)
    changes = lora_changes(description.models, dict(loras))
    return any(change.layers.get(part) for change in changes for part in description.system.text.parts)


def described(facts: Facts, attention: str = "xla") -> loading.Description:
    """Describes a sweep's model without loading its weights.

    A later stage of a cascade shares the first stage's text encoders if both encode text in the same way.

    Raises:
        FileNotFoundError, CheckpointError: as for `sega_jax.load`.
    """
    return _described(facts.model, attention, None if facts.earlier is None else _readers(facts.first, attention))


class Readers(NamedTuple):
    """The parts of a checkpoint that encode text."""

    type: type  # the class of the encoded text
    networks: Mapping[str, Any]  # {folder: text encoder}
    tokenizer: Any


def _readers(facts: Facts, attention: str = "xla") -> Readers:
    description = described(facts, attention)
    reader = description.system.text
    networks = {part: module for part, module in description.networks.items() if part in reader.parts}
    return Readers(reader.type, networks, description.tokenizer)


def _described(model: Mapping[str, Any], attention: str, readers: Readers | None) -> loading.Description:
    source, checker = _source(model), model.get("safety_checker", True)
    without = [] if checker else [CHECKER]
    with muted():
        if readers is None or source.system.text.type is not readers.type:
            folder = source.fetch(model.get("variant"), without=without)
            return loading.describe(folder, attention, tokenizer=source.vocabulary(), safety_checker=checker)
        folder = source.fetch(model.get("variant"), without=[*without, *readers.networks, "tokenizer"])
        tokenizer, replaced = readers.tokenizer, readers.networks
        return loading.describe(folder, attention, tokenizer=tokenizer, safety_checker=checker, replaced=replaced)


def _source(model: Mapping[str, Any]) -> sources.Source:
    return sources.find(model.get("source", loading.DEMO), model.get("revision"))


@lru_cache
def _scheduler(config: str, name: str | None) -> Scheduler:
    scheduler = as_scheduler(json.loads(config))
    return scheduler if name is None else as_scheduler(name, scheduler.config)


# A placeholder for a picture, used where only the presence of a picture matters.
_PICTURE = np.zeros((1, 1, 3), np.uint8)


@lru_cache
def _call(call: Any, settings: tuple[tuple[str, Any], ...]) -> Any:
    """Returns a call with the given settings, an empty prompt, and `_PICTURE` for every picture."""
    pictures = pictures_of(call)
    return call("", **{name: _PICTURE if name in pictures and value else value for name, value in settings})


@lru_cache
def pictures_of(call: Any) -> tuple[str, ...]:
    """Returns the names of the arguments of a family's calls that are pictures."""
    return tuple(name for name, one in call_settings(call).items() if isinstance(one.kind, Pictures))


@lru_cache
def _calls(facts: Facts, call: Any, name: str | None, shared: tuple[tuple[str, Any], ...]) -> int:
    return len(facts.family.sampler.table(_call(call, shared), facts.scheduler_of(name)).call)


@lru_cache
def _static(facts: Facts, call: Any, name: str | None, shared: tuple[tuple[str, Any], ...]) -> Any:
    return facts.family.sampler.static(_call(call, shared), facts.scheduler_of(name))


@lru_cache
def check_together(facts: Facts, declaration: Any, name: str | None, settings: tuple[tuple[str, Any], ...]) -> None:
    """Checks that the settings of a call are compatible with each other. Prompts and seed are not checked.

    Raises:
        ValueError: two settings are not compatible.
    """

    def refuse(message: str) -> None:
        raise ValueError(message)

    call = _call(declaration, settings)
    facts.family.sampler.check(call, facts.scheduler_of(name), refuse)
