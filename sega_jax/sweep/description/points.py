"""A point holds the complete settings of one picture in a sweep. The picture's name is a hash of these settings.

`sega_jax.sweep.planning.file_names` names the picture's file."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from sega_jax.method.arguments import REQUIRED, Argument
from sega_jax.method.guidance import Edit
from sega_jax.method.guidance.edits import warmup_of
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.sweep.description import stages
from sega_jax.sweep.description.facts import Facts, changes_text, check_together, pictures_of
from sega_jax.sweep.description.fields import (
    ADAPTERS,
    OTHERS,
    adapter_kinds,
    call_settings,
    check_single,
    edit_settings,
)
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.systems.sizes import shape_from


class Point(NamedTuple):
    """The complete settings of one picture."""

    settings: tuple[tuple[str, Any], ...]  # (name, value) of each call argument that a sweep may vary
    shared: tuple[tuple[str, Any], ...]  # the arguments that all pictures of a batch share, and arguments that are None
    outline: tuple[tuple[str, Any], ...]  # `shared`, with True in place of each picture; determines the schedule
    plain: tuple[tuple[str, Any], ...]  # the arguments that affect a picture even without edits
    scheduler: str | None  # None for the checkpoint's scheduler
    edits: Mapping[str, Edit]  # {name: edit} of the active edits, each with its momentum settings
    adapters: tuple[tuple[str, Pairs], ...]  # the LoRAs and textual inversions, if any
    files: tuple[tuple[str, str], ...]  # (path, SHA-256) of every file that the picture depends on
    text_adapters: tuple[tuple[str, Pairs], ...] = ()  # the first stage's LoRAs, if they change this stage's text

    @property
    def call(self) -> dict[str, Any]:
        """The call's arguments, {name: value}."""
        return dict(self.settings)


def point(settings: Mapping[str, Any], sweep: Sweep, facts: Facts) -> Point:
    """Returns the complete settings of a point; for a cascade, the settings of the stage that `facts` describes.

    Args:
        settings: the point's settings as the sweep specifies them, {key: value}.

    Raises:
        ValueError: the settings are not compatible with each other or with the checkpoint.
    """
    if facts.stage is None:
        return _point(settings, sweep, facts)
    stage_settings = stages.of_stage(settings, facts.stage)
    if facts.earlier is not None:
        before = point(settings, sweep, facts.earlier)
        size = before.call["height"], before.call["width"]
        stage_settings["image"] = str(stages.Earlier(name(before, facts.earlier), size))
        stage_settings |= {"height": facts.sizes.enlarges * size[0], "width": facts.sizes.enlarges * size[1]}
    result = _point(stage_settings, sweep, facts)
    if not facts.shares_text:
        return result
    first = point(settings, sweep, facts.first)
    if not changes_text(facts.first, first.adapters, first.files):
        return result
    return result._replace(text_adapters=tuple((name, pairs) for name, pairs in first.adapters if name == "lora"))


def _point(settings: Mapping[str, Any], sweep: Sweep, facts: Facts) -> Point:
    arguments = call_settings(facts.family.call)
    for key in settings:
        if "." not in key and key not in arguments and key not in OTHERS:
            raise ValueError(
                f"{key!r} is not a setting of {facts.family.title}; its settings are {', '.join(arguments)}"
            )
    given = {**facts.recommended.call, **settings}
    values = {name: _value(name, one, given) for name, one in arguments.items()}
    momentum = {name: values.pop(name) for name in edit_settings() if name in values}
    edits = _edits(settings, sweep, momentum)
    pictures = {name: values[name] for name in pictures_of(facts.declaration) if values[name] is not None}
    if facts.sizes.enlarges and not pictures:
        raise ValueError(
            f"{facts.family.title} enlarges pictures and needs a picture; give image in [call], or as an axis in [grid]"
        )
    size = next((_size(path, sweep) for path in pictures.values()), None)
    height, width, _ = shape_from(facts.sizes, values["height"], values["width"], size)
    values |= {"height": height * facts.sizes.factor, "width": width * facts.sizes.factor}
    values["seed"] = values["seed"] or 0
    defaults = facts.family.sampler.defaults(facts.scheduler_of(settings.get("scheduler")))
    values |= {name: value for name, value in defaults.items() if values[name] is None}
    if values["negative_prompt"] is None:
        values["negative_prompt"] = facts.negative
    if not edits:
        # Without edits, settings that affect only edits must not change the picture's name.
        values |= {name: one.default for name, one in arguments.items() if one.of_edits and name in values}
    shared = {name: value for name, value in values.items() if arguments[name].varies != "row" or value is None}
    plain = {name: value for name, value in values.items() if not arguments[name].of_edits}
    outline = shared | dict.fromkeys(pictures, True)
    groups = [tuple(group.items()) for group in (values, shared, outline, plain)]
    adapters = tuple((name, settings[name]) for name in ADAPTERS if settings.get(name))
    kinds = adapter_kinds()
    paths = [path for path in pictures.values() if path in sweep.files]
    paths += [path for name, pairs in adapters for path in kinds[name].files(pairs)]
    files = tuple((path, sweep.files[path]["digest"]) for path in paths)
    result = Point(groups[0], groups[1], groups[2], groups[3], settings.get("scheduler"), edits, adapters, files)
    free = ("prompt", "negative_prompt", "seed")
    together = tuple((name, True if name in pictures else value) for name, value in values.items() if name not in free)
    try:
        check_together(facts, facts.declaration, result.scheduler, together)
    except ValueError as error:
        raise ValueError(f"{error}; put settings that depend on each other in [zip]") from None
    calls = facts.calls(result)
    edits = {name: facts.recommended.edit(edit, calls) for name, edit in edits.items()}
    _check_cooldowns(edits)
    return result._replace(edits=edits)


def _value(name: str, argument: Argument, settings: Mapping[str, Any]) -> Any:
    """Returns the value of a call's argument; None for a required argument that is missing."""
    if name not in settings:
        return None if argument.default is REQUIRED else argument.default
    return settings[name] if stages.earlier(settings[name]) else check_single(argument, settings[name], name)


def _edits(settings: Mapping[str, Any], sweep: Sweep, momentum: Mapping[str, Any]) -> dict[str, Edit]:
    edits = {}
    for name in settings.get("edits", sweep.edits):
        own = {key: settings[f"{name}.{key}"] for key in edit_settings() if f"{name}.{key}" in settings}
        edits[name] = Edit(**{"concept": name, **momentum, **own})
    return edits


def _check_cooldowns(edits: Mapping[str, Edit]) -> None:
    for name, edit in edits.items():
        if edit.cooldown is not None and edit.cooldown <= warmup_of(edit):
            raise ValueError(
                f"{name}.cooldown={edit.cooldown} should be greater than {name}.warmup={edit.warmup}; put both axes in"
                " [zip], with each cooldown above its warmup"
            )


def _size(picture: str, sweep: Sweep) -> tuple[int, int]:
    """Returns the height and width, in pixels, of a picture from a file or from the previous stage."""
    earlier = stages.earlier(picture)
    if earlier is not None:
        return earlier.size
    height, width = sweep.files[picture]["size"]
    return height, width


def name(point: Point, facts: Facts) -> str:
    """Returns a picture's name, 20 hexadecimal digits. The name is a hash of everything that determines the picture,
    except its batch. Files are identified by their contents, not their paths.
    """
    scheduler = facts.scheduler_of(point.scheduler)
    contents, pictures = dict(point.files), pictures_of(facts.declaration)
    declared = call_settings(facts.declaration)
    settings = [
        (name, value)
        for name, value in point.settings
        if not (declared[name].later and value == declared[name].default)
    ]
    # These model options do not change what a picture shows.
    model = {key: value for key, value in facts.model.items() if key not in ("attention", "safety_checker")}
    identity: dict[str, Any] = {
        "model": model,
        "system": facts.system,
        "call": {name: contents.get(value, value) if name in pictures else value for name, value in settings},
        "scheduler": None if scheduler is None else [scheduler.name, dict(scheduler.options)],
        "edits": [[getattr(edit, key) for key in edit_settings()] for edit in point.edits.values()],
    }
    if point.adapters:
        identity["adapters"] = [
            (name, [[contents.get(one, one) for one in pair] for pair in pairs]) for name, pairs in point.adapters
        ]
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
