"""Edits as the shell writes them: "glasses", "-beard:scale=6,threshold=0.95".

Words that would mean something else there, such as a leading minus, stand in quotation marks, as a string of JSON:
'"-glasses":scale=6'.
"""

import dataclasses
import json
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
    removes = text.startswith("-")
    words, rest = _quoted(text.removeprefix("-")) or _plain_words(text)
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


def _quoted(text: str) -> tuple[str, str] | None:
    """Returns the words in quotation marks and the settings after them; None for words without quotation marks."""
    if not text.startswith('"'):
        return None
    try:
        words, end = json.JSONDecoder(strict=False).raw_decode(text)
    except ValueError:
        return None
    rest = text[end:]
    return (words, rest.removeprefix(":")) if not rest or rest.startswith(":") else None


def _plain_words(text: str) -> tuple[str, str]:
    """Returns the words and the settings.

    Raises:
        ValueError: there are no words, or they look like settings.
    """
    words, colon, rest = text.rpartition(":")
    if not colon or "=" not in rest:
        words, rest = text, ""
    words = words.removeprefix("-").strip()
    if not words:
        raise ValueError(f"--edit {text!r} names no concept")
    if astray := re.search(rf"[:,]\s*({'|'.join(_SETTINGS)})\s*[:=]", words.replace("-", "_")):
        raise ValueError(
            f"--edit {text!r}: {astray[1]!r} looks like a setting; settings follow one colon, as in"
            f' "{words[: astray.start()]}:{astray[1]}=5"'
        )
    return words, rest


def format_edit(edit: Edit, defaults: Defaults = LIBRARY) -> str:
    """Writes an edit as `parse_edit` reads it, with every setting that is not the default."""
    minus = "-" if edit.scale < 0 else ""
    default = defaults.remove if minus else defaults.add
    values = {name: getattr(edit, name) for name in _SETTINGS}
    values = {name: value for name, value in values.items() if value not in (None, getattr(default, name))}
    if minus and "scale" in values:
        values["scale"] *= -1
    listed = ",".join(f"{name}={_plain(value)}" for name, value in values.items())
    listed = f":{listed}" if listed else ""
    plain = f"{minus}{edit.concept}{listed}"
    try:
        if parse_edit(plain, defaults) == edit:
            return plain
    except ValueError:
        pass
    return f"{minus}{json.dumps(edit.concept, ensure_ascii=False)}{listed}"


def describe(edit: Edit) -> str:
    """Returns a line about an edit."""
    begins = f"from call {edit.warmup}" + ("" if edit.cooldown is None else f" to {edit.cooldown}")
    sign = "-" if edit.scale < 0 else "+"
    return f"{sign} {edit.concept}: scale {abs(edit.scale):g}, threshold {edit.threshold:g}, {begins}"


def _plain(value: float) -> str:
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)
