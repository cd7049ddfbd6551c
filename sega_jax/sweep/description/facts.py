"""Facts: what a plan has to know about a sweep's checkpoint, or about each stage of a cascade, apart from weights."""

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
from sega_jax.sweep.description import stages
from sega_jax.sweep.description.fields import call_settings
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.systems.base import Sizes, System
from sega_jax.systems.images import Pictures
from sega_jax.systems.registry import CHECKER, named
from sega_jax.text.files import CheckpointError


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a checkpoint that planning needs, without its weights. All of them can be written as JSON.

    Example:
        >>> from sega_jax import sweep
        >>> facts = sweep.Facts.of(sweep.Sweep(call={"prompt": "a portrait"}))
        >>> facts.system, facts.sizes.default
        ('stable_diffusion', (128, 128))
    """

    model: Mapping[str, Any]  # what `sega_jax.load` takes, with the folder's whole path, or the commit on the hub
    system: str  # the name of the family
    scheduler: Mapping[str, Any] | None  # the config; None for a family that has its own schedule
    sizes: Sizes
    negative: str | None = ""  # what no negative prompt means, in words; None where no words mean the same
    stage: str | None = None  # of a cascade, by name; None for a model by itself
    earlier: "Facts | None" = None  # of the stage before, whose pictures this one enlarges

    @classmethod
    def of(cls, sweep: Sweep) -> "Facts":
        """Returns the facts of a sweep's model, of a cascade those of its last stage. The files of a model on the hub
        are fetched, if they are not here.

        Raises:
            FileNotFoundError, CheckpointError: as `sega_jax.load`; or a stage is not of this cascade.
        """
        names = stages.later_stages()
        later = {name: model for name, model in sweep.model.items() if name in names}
        model = {name: value for name, value in sweep.model.items() if name not in names}
        if not later:
            _check_stages(sweep, [])
            return cls._of(model)
        # All families by their indices, before weights are fetched, which takes hours.
        first = _source(model).system
        follow = _following(first, later)
        _check_stages(sweep, [FIRST, *follow])
        facts = cls._of({**model, "safety_checker": False}, FIRST)
        common = {name: value for name, value in model.items() if name not in ("source", "revision")}
        for name, system in follow.items():
            shares = system.text.type is first.text.type
            options = {**common, **later[name], **({"safety_checker": False} if shares else {})}
            facts = cls._of(options, name, facts)
        return facts

    @classmethod
    def _of(cls, model: dict[str, Any], stage: str | None = None, earlier: "Facts | None" = None) -> "Facts":
        readers = None if earlier is None else _readers(earlier.first)
        found = _source(model)
        description = _described(model, "xla", readers)
        if "source" in model:
            place, commit = sources.place(found)
            model |= {"source": place} | ({} if commit is None else {"revision": commit})
        scheduler = None if description.scheduler is None else description.scheduler.config
        sizes = description.system.sampler.sizes(description.models)
        reader = description.system.text
        negative = reader.negative(description.models, description.tokenizer, description.extras)
        negative = negative if isinstance(negative, str) else None
        return cls(model, description.system.name, scheduler, sizes, negative, stage, earlier)

    @property
    def family(self) -> System:
        """The checkpoint's family."""
        return named(self.system)

    @property
    def chain(self) -> "list[Facts]":
        """The facts of all stages up to this one, the first stage first."""
        return [*(self.earlier.chain if self.earlier is not None else []), self]

    @property
    def first(self) -> "Facts":
        """The facts of the first stage."""
        return self.chain[0]

    @property
    def prefix(self) -> str:
        """What the names of this stage's settings begin with: nothing for the first stage, or "stage2."."""
        return "" if self.earlier is None else f"{self.stage}."

    @property
    def shares_text(self) -> bool:
        """Whether the first stage's networks read the text of this stage."""
        return self.earlier is not None and self.family.text.type is self.first.family.text.type

    @property
    def declaration(self) -> Any:
        """The dataclass of the family's call."""
        return self.family.call

    def scheduler_of(self, name: str | None) -> Scheduler | None:
        """Returns the checkpoint's scheduler, or another one that takes its options over.

        Raises:
            ValueError: an option of it is not supported, or the family takes no scheduler.
        """
        if self._config is None:
            if name is not None:
                raise ValueError(f"scheduler={name!r}: {self.family.title} has a schedule of its own; leave it out")
            return None
        return _scheduler(self._config, name)

    def calls(self, point: Any) -> int:
        """Returns the number of model calls of one picture."""
        return _calls(self, self.declaration, point.scheduler, point.outline)

    def static(self, point: Any) -> Any:
        """Returns what the family compiles in for a picture."""
        return _static(self, self.declaration, point.scheduler, point.outline)

    @cached_property
    def _config(self) -> str | None:
        return None if self.scheduler is None else json.dumps(dict(self.scheduler))

    def __hash__(self) -> int:
        return hash((self.system, self._config))


def _check_stages(sweep: Sweep, there: list[str | None]) -> None:
    """Checks that settings are of stages that are there.

    Raises:
        ValueError: they are not.
    """
    said = {stages.split(key)[0]: key for key in (*sweep.call, *sweep.axes)}
    guided = [sweep.call.get("edited", ()), *(one for block in sweep.blocks for one in block.axes.get("edited", ()))]
    said |= {stage: "edited" for one in guided for stage in one}
    if not there and "edited" in (*sweep.call, *sweep.axes):
        raise ValueError("'edited' says which stages of a cascade edits guide, and there is one model; leave it out")
    for stage, key in said.items():
        if stage and stage not in there:
            raise ValueError(f"{key!r} is of {stage}, which is not there; name its checkpoint in [model] as {stage}")


def _following(first: System, later: Mapping[str, Mapping[str, Any]]) -> dict[str, System]:
    """Returns the families of a cascade's later stages, in their order.

    Raises:
        CheckpointError: a stage is not of this cascade, or comes after one that is missing.
    """
    for name in later:
        if name not in first.stages:
            raise CheckpointError(f"model: {first.title} starts no cascade with a stage {name}; leave {name} out")
    order = list(first.stages)
    for i, name in enumerate(order[: max(map(order.index, later)) + 1]):
        if name not in later:
            after = next(other for other in order[i:] if other in later)
            raise CheckpointError(f"model: {after} is given without {name}, whose pictures it enlarges")
        source, expected = _source(later[name]), first.stages[name]
        if source.system is not expected:
            given = str(source.name)
            raise CheckpointError(f"model: {name}={given!r} is {source.system.title}, not {expected.title}")
    return {name: system for name, system in first.stages.items() if name in later}


@lru_cache
def changes_text(facts: Facts, adapters: tuple[tuple[str, Pairs], ...], files: tuple[tuple[str, str], ...]) -> bool:
    """Tells whether LoRAs change the networks of a checkpoint that read text.

    Args:
        files: the SHA-256 of the files by their paths, so that a file that changes is read again.

    Raises:
        CheckpointError: a file does not fit the checkpoint.
    """
    del files
    loras = dict(adapters).get("lora")
    if not loras:
        return False
    found = described(facts)
    changes = lora_changes(found.models, dict(loras))
    return any(change.layers.get(part) for change in changes for part in found.system.text.parts)


def described(facts: Facts, attention: str = "xla") -> loading.Description:
    """Returns what a sweep's model is, without its weights. A later stage of a cascade has the first one's networks
    that read text, where they suit it.

    Raises:
        FileNotFoundError, CheckpointError: as `sega_jax.load`.
    """
    return _described(facts.model, attention, None if facts.earlier is None else _readers(facts.first, attention))


class Readers(NamedTuple):
    """What reads text in a checkpoint."""

    type: type  # of the text
    networks: Mapping[str, Any]  # by the names of their folders
    tokenizer: Any


def _readers(facts: Facts, attention: str = "xla") -> Readers:
    found = described(facts, attention)
    reader = found.system.text
    networks = {part: module for part, module in found.networks.items() if part in reader.parts}
    return Readers(reader.type, networks, found.tokenizer)


def _described(model: Mapping[str, Any], attention: str, readers: Readers | None) -> loading.Description:
    found, checker = _source(model), model.get("safety_checker", True)
    without = [] if checker else [CHECKER]
    with muted():
        if readers is None or found.system.text.type is not readers.type:
            folder = found.fetch(model.get("variant"), without=without)
            return loading.describe(folder, attention, tokenizer=found.vocabulary(), safety_checker=checker)
        folder = found.fetch(model.get("variant"), without=[*without, *readers.networks, "tokenizer"])
        tokenizer, replaced = readers.tokenizer, readers.networks
        return loading.describe(folder, attention, tokenizer=tokenizer, safety_checker=checker, replaced=replaced)


def _source(model: Mapping[str, Any]) -> sources.Source:
    return sources.find(model.get("source", loading.DEMO), model.get("revision"))


@lru_cache
def _scheduler(config: str, name: str | None) -> Scheduler:
    scheduler = as_scheduler(json.loads(config))
    return scheduler if name is None else as_scheduler(name, scheduler.config)


# In place of pictures, where it only matters that there is one.
_PICTURE = np.zeros((1, 1, 3), np.uint8)


@lru_cache
def _call(call: Any, settings: tuple[tuple[str, Any], ...]) -> Any:
    """Returns a call of no words with these settings, and with another picture in place of one that is given."""
    pictures = pictures_of(call)
    return call("", **{name: _PICTURE if name in pictures and value else value for name, value in settings})


@lru_cache
def pictures_of(call: Any) -> tuple[str, ...]:
    """Returns the arguments of a family's calls that are pictures."""
    return tuple(name for name, one in call_settings(call).items() if isinstance(one.kind, Pictures))


@lru_cache
def _calls(facts: Facts, call: Any, name: str | None, shared: tuple[tuple[str, Any], ...]) -> int:
    return len(facts.family.sampler.table(_call(call, shared), facts.scheduler_of(name)).call)


@lru_cache
def _static(facts: Facts, call: Any, name: str | None, shared: tuple[tuple[str, Any], ...]) -> Any:
    return facts.family.sampler.static(_call(call, shared), facts.scheduler_of(name))


@lru_cache
def check_together(facts: Facts, declaration: Any, name: str | None, settings: tuple[tuple[str, Any], ...]) -> None:
    """Checks the settings of a call together, without its words and seed."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    call = _call(declaration, settings)
    facts.family.sampler.check(call, facts.scheduler_of(name), refuse)
