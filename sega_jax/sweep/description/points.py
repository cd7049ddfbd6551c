"""Points: what a sweep says of one picture, complete, and the picture's name, a hash of it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sega_jax.method.guidance import Edit
from sega_jax.method.schedules import Scheduler
from sega_jax.pipelines import loading, sources
from sega_jax.pipelines.components import as_scheduler
from sega_jax.pipelines.sizes import state_shape
from sega_jax.sweep.description.fields import EDIT
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.systems.base import Sizes, Usual
from sega_jax.systems.registry import CHECKER, STABLE_DIFFUSION, STAGE_1

_EDIT, _CALL_MOMENTUM = Edit(""), {"momentum_scale": 0.1, "momentum_beta": 0.4}
_SEMANTICS, _SUPPORT = "diffusers", "channel"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a plan has to know of a checkpoint, none of it weights; all of it can be written as JSON."""

    model: Mapping[str, Any]  # what `sega_jax.load` takes, with the folder's whole path, or the commit on the hub
    scheduler: Mapping[str, Any]  # the config
    usual: Usual  # where a sweep says nothing
    sizes: Sizes

    @classmethod
    def of(cls, sweep: Sweep) -> "Facts":
        """Of a sweep's model. Of one on the hub the files are fetched, if they are not here.

        Raises:
            FileNotFoundError, CheckpointError: as of `sega_jax.load`.
            ValueError: a checkpoint that starts from a small picture, or has no schedule.
        """
        model = dict(sweep.model)
        found, folder = _located(model)
        description = described(model)
        if found.commit is not None:
            model |= {"revision": found.commit}
        elif "source" in model:
            model |= {"source": str(folder.resolve())}
        return cls(model, description.scheduler.config, description.models.usual, description.models.sizes)

    def scheduler_of(self, name: str | None) -> Scheduler:
        """The checkpoint's scheduler, or another one that takes its options over.

        Raises:
            ValueError: an option of it is not supported.
        """
        return _scheduler(self._config, name)

    def calls(self, point: "Point") -> int:
        """Of the network, for one picture."""
        return _calls(self._config, point.scheduler, point.steps)

    @cached_property
    def _config(self) -> str:
        return json.dumps(dict(self.scheduler))


def described(model: Mapping[str, Any], attention: str = "xla") -> loading.Description:
    """What a sweep's model is, without its weights.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as of `Facts.of`.
    """
    return loading.describe(_located(model)[1], attention, safety_checker=model.get("safety_checker", True))


def _located(model: Mapping[str, Any]) -> tuple[sources.Source, Path]:
    """The checkpoint, and the folder that it is fetched to."""
    found = sources.find(model.get("source", loading.DEMO), model.get("revision"))
    if found.kind not in (STABLE_DIFFUSION, STAGE_1):
        raise ValueError(
            f"model: {found.name} is {found.kind.name}; sweeps are of {STABLE_DIFFUSION.name} and of {STAGE_1.name}"
        )
    without = () if model.get("safety_checker", True) else (CHECKER,)
    return found, found.fetch(model.get("variant"), without=without)


@lru_cache
def _scheduler(config: str, name: str | None) -> Scheduler:
    scheduler = as_scheduler(json.loads(config))
    return scheduler if name is None else as_scheduler(name, scheduler.config)


@lru_cache
def _calls(config: str, name: str | None, steps: int | str) -> int:
    return len(_scheduler(config, name).table(steps).call)


class Point(NamedTuple):
    """One picture."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int | str
    guidance_scale: float
    eta: float
    height: int
    width: int
    semantics: str
    support: str
    scheduler: str | None  # None is the checkpoint's
    edits: Mapping[str, Edit]  # those that act, by their names, each with its momentum


def point(settings: Mapping[str, Any], sweep: Sweep, facts: Facts) -> Point:
    """What the settings of a point mean.

    Raises:
        ValueError: settings that do not go together, or not with the checkpoint.
    """

    def said(key, usual):
        return settings.get(key, usual)

    momentum = {key: said(key, usual) for key, usual in _CALL_MOMENTUM.items()}
    edits = {}
    for name in said("edits", sweep.edits):
        usual = {key: getattr(_EDIT, key) for key in EDIT} | {"concept": name} | momentum
        edits[name] = Edit(**{key: said(f"{name}.{key}", value) for key, value in usual.items()})
        if edits[name].cooldown is not None and edits[name].cooldown <= edits[name].warmup:
            raise ValueError(
                f"{name}.cooldown={edits[name].cooldown} is before {name}.warmup={edits[name].warmup} in one of the"
                " points; say such axes side by side, in [zip], with each cooldown above its warmup"
            )
    height, width, _ = state_shape(facts.sizes, said("height", None), said("width", None))
    made = Point(
        prompt=settings["prompt"],
        negative_prompt=said("negative_prompt", ""),
        seed=said("seed", 0),
        steps=said("steps", facts.usual.steps),
        guidance_scale=said("guidance_scale", float(facts.usual.guidance_scale)),
        eta=said("eta", 0.0),
        height=height * facts.sizes.factor,
        width=width * facts.sizes.factor,
        # What no edit asks about does not make another picture.
        semantics=said("semantics", _SEMANTICS) if edits else _SEMANTICS,
        support=said("support", _SUPPORT) if edits else _SUPPORT,
        scheduler=said("scheduler", None),
        edits=edits,
    )
    scheduler = facts.scheduler_of(made.scheduler)
    if made.eta and scheduler.solver != "ddim":
        raise ValueError(f"eta={made.eta} is DDIM's, {scheduler.name} has none; say the two side by side, in [zip]")
    facts.calls(made)
    return made


def name(made: Point, facts: Facts) -> str:
    """The picture's, of 20 hexadecimal digits: a hash of all that decides it, but how many share its batch."""
    scheduler = facts.scheduler_of(made.scheduler)
    what = made._asdict() | {
        "model": dict(facts.model),
        "scheduler": [scheduler.name, dict(scheduler.options)],
        "edits": [[getattr(edit, key) for key in EDIT] for edit in made.edits.values()],
    }
    # Of the model, what only says how it is computed or checked decides nothing.
    what["model"] = {key: value for key, value in what["model"].items() if key not in ("attention", "safety_checker")}
    text = json.dumps(what, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
