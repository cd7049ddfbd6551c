"""Points: the complete settings of one picture of a sweep, and the picture's name, a hash of them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from sega_jax.method.arguments import REQUIRED, Argument
from sega_jax.method.guidance import Edit
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.sweep.description import stages
from sega_jax.sweep.description.facts import Facts, changes_text, check_together, pictures_of
from sega_jax.sweep.description.fields import ADAPTERS, OTHERS, adapter_kinds, call_settings, edit_settings, fixed
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.systems.sizes import shape_from

_EDIT = Edit("")


class Point(NamedTuple):
    """One picture."""

    settings: tuple[tuple[str, Any], ...]  # every argument of the call that a sweep may vary, by its name
    shared: tuple[tuple[str, Any], ...]  # those that all pictures of a batch share, with those that are None
    outline: tuple[tuple[str, Any], ...]  # those that decide its schedule: `shared`, and True for each picture given
    plain: tuple[tuple[str, Any], ...]  # those that matter without edits, too
    scheduler: str | None  # None is the checkpoint's
    edits: Mapping[str, Edit]  # those that act, by their names, each with its momentum
    adapters: tuple[tuple[str, Pairs], ...]  # the LoRAs and new words, where there are any
    files: tuple[tuple[str, str], ...]  # the SHA-256 of all files that it is made from, by their paths
    text_adapters: tuple[tuple[str, Pairs], ...] = ()  # the first stage's LoRAs, where they change this stage's text

    @property
    def call(self) -> dict[str, Any]:
        """The settings by name."""
        return dict(self.settings)


def point(given: Mapping[str, Any], sweep: Sweep, facts: Facts) -> Point:
    """Returns what the settings of a point mean, of a cascade for the stage of these facts.

    Raises:
        ValueError: settings that do not go together, or not with the checkpoint.
    """
    if facts.stage is None:
        return _point(given, sweep, facts)
    own = stages.of_stage(given, facts.stage)
    if facts.earlier is not None:
        before = point(given, sweep, facts.earlier)
        size = before.call["height"], before.call["width"]
        own["image"] = str(stages.Earlier(name(before, facts.earlier), size))
        own |= {"height": facts.sizes.enlarges * size[0], "width": facts.sizes.enlarges * size[1]}
    made = _point(own, sweep, facts)
    if not facts.shares_text:
        return made
    first = point(given, sweep, facts.first)
    if not changes_text(facts.first, first.adapters, first.files):
        return made
    return made._replace(text_adapters=tuple((name, pairs) for name, pairs in first.adapters if name == "lora"))


def _point(given: Mapping[str, Any], sweep: Sweep, facts: Facts) -> Point:
    arguments = call_settings(facts.family.call)
    for key in given:
        if "." not in key and key not in arguments and key not in OTHERS:
            raise ValueError(f"{key!r} is not a setting of {facts.family.title}, which has {', '.join(arguments)}")
    values = {name: _value(name, one, given) for name, one in arguments.items()}
    momentum = {name: values.pop(name) for name in edit_settings() if name in values}
    edits = _edits(given, sweep, momentum)
    pictures = {name: values[name] for name in pictures_of(facts.declaration) if values[name] is not None}
    if facts.sizes.enlarges and not pictures:
        raise ValueError(f"{facts.family.title} enlarges pictures; say image in [call], or as an axis in [grid]")
    size = next((_size(path, sweep) for path in pictures.values()), None)
    height, width, _ = shape_from(facts.sizes, values["height"], values["width"], size)
    values |= {"height": height * facts.sizes.factor, "width": width * facts.sizes.factor}
    values["seed"] = values["seed"] or 0
    defaults = facts.family.sampler.defaults(facts.scheduler_of(given.get("scheduler")))
    values |= {name: value for name, value in defaults.items() if values[name] is None}
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
    kinds = adapter_kinds()
    paths = [path for path in pictures.values() if path in sweep.files]
    paths += [path for name, pairs in adapters for path in kinds[name].files(pairs)]
    files = tuple((path, sweep.files[path]["digest"]) for path in paths)
    made = Point(groups[0], groups[1], groups[2], groups[3], given.get("scheduler"), edits, adapters, files)
    own = ("prompt", "negative_prompt", "seed")
    together = tuple((name, True if name in pictures else value) for name, value in values.items() if name not in own)
    try:
        check_together(facts, facts.declaration, made.scheduler, together)
    except ValueError as error:
        raise ValueError(f"{error}; say settings that go together side by side, in [zip]") from None
    facts.calls(made)
    return made


def _value(name: str, argument: Argument, given: Mapping[str, Any]) -> Any:
    """Returns the value of an argument of the call; None for one that is required and not given."""
    if name not in given:
        return None if argument.default is REQUIRED else argument.default
    return given[name] if stages.earlier(given[name]) else fixed(argument, given[name], name)


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


def _size(picture: str, sweep: Sweep) -> tuple[int, int]:
    """Returns the height and width in pixels of a picture by its path, or of one that the stage before makes."""
    made = stages.earlier(picture)
    if made is not None:
        return made.size
    height, width = sweep.files[picture]["size"]
    return height, width


def name(made: Point, facts: Facts) -> str:
    """Returns the picture's name, of 20 hexadecimal digits: a hash of everything that determines the picture, except
    the batch that it is made in. Files are hashed by their contents, wherever they are."""
    scheduler = facts.scheduler_of(made.scheduler)
    contents, pictures = dict(made.files), pictures_of(facts.declaration)
    declared = call_settings(facts.declaration)
    settings = [
        (name, value) for name, value in made.settings if not (declared[name].later and value == declared[name].default)
    ]
    # Of the model, what only says how it is computed or checked decides nothing.
    model = {key: value for key, value in facts.model.items() if key not in ("attention", "safety_checker")}
    what: dict[str, Any] = {
        "model": model,
        "system": facts.system,
        "call": {name: contents.get(value, value) if name in pictures else value for name, value in settings},
        "scheduler": None if scheduler is None else [scheduler.name, dict(scheduler.options)],
        "edits": [[getattr(edit, key) for key in edit_settings()] for edit in made.edits.values()],
    }
    if made.adapters:
        what["adapters"] = [
            (name, [[contents.get(one, one) for one in pair] for pair in pairs]) for name, pairs in made.adapters
        ]
    text = json.dumps(what, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
