"""Points: the complete settings of one picture of a sweep, and the picture's name, a hash of them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sega_jax.method.arguments import REQUIRED
from sega_jax.method.guidance import Edit
from sega_jax.method.schedules import Scheduler
from sega_jax.pipelines import loading, sources
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.components import as_scheduler
from sega_jax.pipelines.messages import muted
from sega_jax.sweep.description.fields import (
    ADAPTERS,
    OTHERS,
    adapter_kinds,
    call_settings,
    edit_settings,
    fixed,
)
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.systems.base import Sizes, System
from sega_jax.systems.images import Pictures, known
from sega_jax.systems.registry import CHECKER, named
from sega_jax.systems.sizes import shape_from

_EDIT = Edit("")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a plan has to know of a checkpoint, none of it weights; all of it can be written as JSON."""

    model: Mapping[str, Any]  # what `sega_jax.load` takes, with the folder's whole path, or the commit on the hub
    system: str  # the name of the family
    scheduler: Mapping[str, Any] | None  # the config; None for a family that has its own schedule
    sizes: Sizes
    negative: str | None = ""  # what no negative prompt means, in words; None where no words mean the same

    @classmethod
    def of(cls, sweep: Sweep) -> "Facts":
        """Returns the facts of a sweep's model. The files of one on the hub are fetched, if they are not here.

        Raises:
            FileNotFoundError, CheckpointError: as `sega_jax.load`.
        """
        model = dict(sweep.model)
        found, folder = _located(model)
        description = described(model)
        if found.commit is not None:
            model |= {"revision": found.commit}
        elif "source" in model:
            model |= {"source": str(folder.resolve())}
        scheduler = None if description.scheduler is None else description.scheduler.config
        sizes = description.system.sampler.sizes(description.models)
        reader = description.system.text
        negative = reader.negative(description.models, description.tokenizer, description.extras)
        negative = negative if isinstance(negative, str) else None
        return cls(model, description.system.name, scheduler, sizes, negative)

    @property
    def family(self) -> System:
        """The checkpoint's family."""
        return named(self.system)

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

    def calls(self, point: "Point") -> int:
        """Returns the number of model calls of one picture."""
        return _calls(self, self.declaration, point.scheduler, point.outline)

    def static(self, point: "Point") -> Any:
        """Returns what the family compiles in for a picture."""
        return _static(self, self.declaration, point.scheduler, point.outline)

    @cached_property
    def _config(self) -> str | None:
        return None if self.scheduler is None else json.dumps(dict(self.scheduler))

    def __hash__(self) -> int:
        return hash((self.system, self._config))


def described(model: Mapping[str, Any], attention: str = "xla") -> loading.Description:
    """Returns what a sweep's model is, without its weights.

    Raises:
        FileNotFoundError, CheckpointError: as `sega_jax.load`.
    """
    with muted():
        return loading.describe(_located(model)[1], attention, safety_checker=model.get("safety_checker", True))


def _located(model: Mapping[str, Any]) -> tuple[sources.Source, Path]:
    """Returns the checkpoint, and the folder that it is fetched to."""
    found = sources.find(model.get("source", loading.DEMO), model.get("revision"))
    without = () if model.get("safety_checker", True) else (CHECKER,)
    return found, found.fetch(model.get("variant"), without=without)


@lru_cache
def _scheduler(config: str, name: str | None) -> Scheduler:
    scheduler = as_scheduler(json.loads(config))
    return scheduler if name is None else as_scheduler(name, scheduler.config)


# In place of pictures, where it only matters that there is one.
_PICTURE = np.zeros((1, 1, 3), np.uint8)


@lru_cache
def _call(call: Any, settings: tuple[tuple[str, Any], ...]) -> Any:
    """Returns a call of no words with these settings, and with another picture in place of one that is given."""
    pictures = _pictures(call)
    return call("", **{name: _PICTURE if name in pictures and value else value for name, value in settings})


@lru_cache
def _pictures(call: Any) -> tuple[str, ...]:
    """Returns the arguments of a family's calls that are pictures."""
    return tuple(name for name, one in call_settings(call).items() if isinstance(one.kind, Pictures))


@lru_cache
def _calls(facts: Facts, call: Any, name: str | None, shared: tuple[tuple[str, Any], ...]) -> int:
    return len(facts.family.sampler.table(_call(call, shared), facts.scheduler_of(name)).call)


@lru_cache
def _static(facts: Facts, call: Any, name: str | None, shared: tuple[tuple[str, Any], ...]) -> Any:
    return facts.family.sampler.static(_call(call, shared), facts.scheduler_of(name))


@lru_cache
def _check(facts: Facts, declaration: Any, name: str | None, settings: tuple[tuple[str, Any], ...]) -> None:
    """Checks the settings of a call together, without its words and seed."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    call = _call(declaration, settings)
    facts.family.sampler.check(call, facts.scheduler_of(name), refuse)


class Point(NamedTuple):
    """One picture."""

    settings: tuple[tuple[str, Any], ...]  # every argument of the call that a sweep may vary, by its name
    shared: tuple[tuple[str, Any], ...]  # those that all pictures of a batch share, with those that are None
    outline: tuple[tuple[str, Any], ...]  # those that decide its schedule: `shared`, and True for each picture given
    plain: tuple[tuple[str, Any], ...]  # those that matter without edits, too
    scheduler: str | None  # None is the checkpoint's
    edits: Mapping[str, Edit]  # those that act, by their names, each with its momentum
    adapters: tuple[tuple[str, Pairs], ...]  # the LoRAs and new words, where there are any

    @property
    def call(self) -> dict[str, Any]:
        """The settings by name."""
        return dict(self.settings)


def point(given: Mapping[str, Any], sweep: Sweep, facts: Facts) -> Point:
    """Returns what the settings of a point mean.

    Raises:
        ValueError: settings that do not go together, or not with the checkpoint.
    """
    arguments = call_settings(facts.family.call)
    for key in given:
        if "." not in key and key not in arguments and key not in OTHERS:
            raise ValueError(f"{key!r} is not a setting of {facts.family.title}, which has {', '.join(arguments)}")
    values = {
        name: fixed(one, given[name], name) if name in given else (None if one.default is REQUIRED else one.default)
        for name, one in arguments.items()
    }
    momentum = {name: values.pop(name) for name in edit_settings() if name in values}
    edits = _edits(given, sweep, momentum)
    pictures = {name: values[name] for name in _pictures(facts.declaration) if values[name] is not None}
    if facts.sizes.enlarges and not pictures:
        raise ValueError(f"{facts.family.title} enlarges pictures; say image in [call], or as an axis in [grid]")
    size = next((known(path).size for path in pictures.values()), None)
    height, width, _ = shape_from(facts.sizes, values["height"], values["width"], size)
    values |= {"height": height * facts.sizes.factor, "width": width * facts.sizes.factor}
    values["seed"] = values["seed"] or 0
    if values["negative_prompt"] is None:
        values["negative_prompt"] = facts.negative
    if not edits:
        # What only edits depend on does not make another picture.
        values |= {name: one.default for name, one in arguments.items() if one.of_edits and name in values}
    shared = {name: value for name, value in values.items() if arguments[name].varies != "row" or value is None}
    plain = {name: value for name, value in values.items() if not arguments[name].of_edits}
    outline = shared | dict.fromkeys(pictures, True)
    groups = [tuple(group.items()) for group in (values, shared, outline, plain)]
    adapters = tuple((name, given[name]) for name in ADAPTERS if given.get(name))
    made = Point(groups[0], groups[1], groups[2], groups[3], given.get("scheduler"), edits, adapters)
    own = ("prompt", "negative_prompt", "seed")
    together = tuple((name, True if name in pictures else value) for name, value in values.items() if name not in own)
    facts.scheduler_of(made.scheduler)
    try:
        _check(facts, facts.declaration, made.scheduler, together)
    except ValueError as error:
        raise ValueError(f"{error}; say settings that go together side by side, in [zip]") from None
    facts.calls(made)
    return made


def _edits(given: Mapping[str, Any], sweep: Sweep, momentum: Mapping[str, Any]) -> dict[str, Edit]:
    edits = {}
    for name in given.get("edits", sweep.edits):
        defaults = {**{key: getattr(_EDIT, key) for key in edit_settings()}, "concept": name, **momentum}
        edit = Edit(**{key: given.get(f"{name}.{key}", value) for key, value in defaults.items()})
        if edit.cooldown is not None and edit.cooldown <= edit.warmup:
            raise ValueError(
                f"{name}.cooldown={edit.cooldown} is before {name}.warmup={edit.warmup} in one of the points; say such"
                " axes side by side, in [zip], with each cooldown above its warmup"
            )
        edits[name] = edit
    return edits


def _digests(made: Point, facts: Facts) -> list[str]:
    """Returns a hash of every file that a picture is made from, so that a file that changes gives another picture."""
    pictures = [known(made.call[name]).digest for name in _pictures(facts.declaration) if made.call[name] is not None]
    kinds = adapter_kinds()
    return pictures + [digest(kinds[name].path(pair)) for name, pairs in made.adapters for pair in pairs]


@cache
def digest(path: str) -> str:
    """Returns the SHA-256 of a file, which is read once."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name(made: Point, facts: Facts) -> str:
    """Returns the picture's name, of 20 hexadecimal digits: a hash of all that decides it, but how many share its
    batch."""
    scheduler = facts.scheduler_of(made.scheduler)
    # Of the model, what only says how it is computed or checked decides nothing.
    model = {key: value for key, value in facts.model.items() if key not in ("attention", "safety_checker")}
    what: dict[str, Any] = {
        "model": model,
        "system": facts.system,
        "call": dict(made.settings),
        "scheduler": None if scheduler is None else [scheduler.name, dict(scheduler.options)],
        "edits": [[getattr(edit, key) for key in edit_settings()] for edit in made.edits.values()],
    }
    if files := _digests(made, facts):
        what |= {"adapters": made.adapters, "files": files}
    text = json.dumps(what, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
