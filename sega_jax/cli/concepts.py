"""Edits as the shell writes them: "glasses", "-beard:scale=6,threshold=0.95"."""

import dataclasses
import re
from typing import Any, NamedTuple

from sega_jax.demo import settings
from sega_jax.method.argument_kinds import Integer
from sega_jax.method.arguments import arguments
from sega_jax.method.guidance import Edit
from sega_jax.method.schedules.spacing import NAMED

_SETTINGS = {name: one for name, one in arguments(Edit).items() if name != "concept"}


class Defaults(NamedTuple):
    """The settings of edits that add or remove a concept and name no others."""

    add: Edit
    remove: Edit


LIBRARY = Defaults(Edit(""), Edit("", scale=-Edit("").scale))


def demo(steps: int | str = settings.STEPS) -> Defaults:
    """Returns the defaults that suit the demo model in a call of so many steps."""
    steps = sum(NAMED[steps]) if isinstance(steps, str) else steps
    return Defaults(settings.add("", steps=steps), settings.remove("", steps=steps))


def parse_edit(text: str, defaults: Defaults = LIBRARY) -> Edit:
    """Reads an edit from `[-]WORDS[:NAME=VALUE,...]`; a leading minus removes the concept.

    Raises:
        ValueError: no words, an unknown setting, or a value that is no number or out of range.
    """
    words, colon, rest = text.rpartition(":")
    if not colon or "=" not in rest:
        words, rest = text, ""
    removes = words.startswith("-")
    words = words.removeprefix("-").strip()
    if not words:
        raise ValueError(f"--edit {text!r} names no concept")
    if astray := re.search(rf"[:,]\s*({'|'.join(_SETTINGS)})\s*[:=]", words.replace("-", "_")):
        raise ValueError(
            f"--edit {text!r}: {astray[1]!r} looks like a setting; settings follow one colon, as in"
            f' "{words[: astray.start()]}:{astray[1]}=5"'
        )
    values: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in rest.split(","))):
        name, _, value = (part.strip() for part in entry.partition("="))
        name = name.replace("-", "_")
        if name not in _SETTINGS or name in values:
            raise ValueError(
                f"--edit {text!r}: {name!r} is {'given twice' if name in values else 'unknown'}; the settings are"
                f" {', '.join(_SETTINGS)}"
            )
        whole = isinstance(_SETTINGS[name].kind, Integer)
        try:
            values[name] = int(value) if whole else float(value)
        except ValueError:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"--edit {text!r}: {name}={value!r} should be {kind}") from None
    if removes and "scale" in values:
        if values["scale"] < 0:
            raise ValueError(f"--edit {text!r}: the leading minus already removes the concept; give a positive scale")
        values["scale"] = -values["scale"]
    return dataclasses.replace(defaults.remove if removes else defaults.add, concept=words, **values)


def format_edit(edit: Edit, defaults: Defaults = LIBRARY) -> str:
    """Writes an edit as `parse_edit` reads it, with every setting that is not the default."""
    minus = "-" if edit.scale < 0 else ""
    default = defaults.remove if minus else defaults.add
    values = {name: getattr(edit, name) for name in _SETTINGS}
    values = {name: value for name, value in values.items() if value not in (None, getattr(default, name))}
    if minus and "scale" in values:
        values["scale"] *= -1
    listed = ",".join(f"{name}={_plain(value)}" for name, value in values.items())
    # A concept that itself ends like a list of settings needs one of its own behind it.
    if not listed and ":" in edit.concept and "=" in edit.concept.rpartition(":")[2]:
        listed = f"weight={_plain(edit.weight)}"
    return f"{minus}{edit.concept}" + (f":{listed}" if listed else "")


def describe(edit: Edit) -> str:
    """Returns a line about an edit."""
    begins = f"from call {edit.warmup}" + ("" if edit.cooldown is None else f" to {edit.cooldown}")
    sign = "-" if edit.scale < 0 else "+"
    return f"{sign} {edit.concept}: scale {abs(edit.scale):g}, threshold {edit.threshold:g}, {begins}"


def _plain(value: float) -> str:
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)
