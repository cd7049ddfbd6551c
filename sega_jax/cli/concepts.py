"""Reads and writes edits in the shell's notation: "glasses", "-beard:scale=6,threshold=0.95".

Words that would be misread, such as words with a leading minus, are written as a JSON string: '"-glasses":scale=6'.
"""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from sega_jax.cli.edit_spelling import corrected, misspelt
from sega_jax.cli.options import bracketed, sentence
from sega_jax.demo.settings import RECOMMENDED
from sega_jax.demo.training.wording import known_words
from sega_jax.method.arguments import arguments
from sega_jax.method.guidance import Edit
from sega_jax.method.guidance.edits import THRESHOLD, WARMUP
from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.recommended import Recommended
from sega_jax.systems.call import Call

_SETTINGS = {name: one for name, one in arguments(Edit).items() if name != "concept"}
# Examples of values, for suggestions.
_EXAMPLES = {name: 20.0 if one.default is None else one.default for name, one in _SETTINGS.items()}
_EXAMPLES |= {"threshold": THRESHOLD, "warmup": WARMUP}
_EXAMPLES |= {name: one.default for name, one in arguments(Call).items() if name in _EXAMPLES}
_LONGEST_CHECKED = 2000  # the number of characters up to which misspelt settings are searched for
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212"  # dashes that look like a minus
_LONGEST = 80  # the number of characters of an edit that error messages show
# Examples of concepts that the demo model knows.
DEMO_WORDS = ("glasses", "sunglasses", "smile", "beard", "hat", "beanie", "curly hair", "blue hair", "hoodie")


def setting_rows() -> list[tuple[str, str]]:
    """Returns (name, explanation) for each setting of a concept, with its default and range, for the help page."""
    steps, default_scale = RECOMMENDED.call["steps"], Edit("").scale
    library = Recommended().edit(Edit(""), steps)
    add, remove = (RECOMMENDED.edit(Edit("", scale=scale), steps) for scale in (default_scale, -default_scale))
    rows = []
    for name, one in _SETTINGS.items():
        value, *own = (getattr(edit, name) for edit in (library, add, remove))
        if name in arguments(Call):
            default = f"the value of {arguments(Call)[name].option}"
        else:
            default = "never" if value is None else f"{value:g}"
        listed = [default]
        if any(abs(other) != value for other in own if other is not None):
            adds, removes = (f"{abs(other):g}" for other in own)
            each = adds if adds == removes else f"{adds} to add and {removes} to remove"
            listed.append(f"for the demo model with {steps} steps, {each}")
        rows.append((name, f"{sentence(one)}{bracketed(listed, one.kind.range)}"))
    return rows


def check_known(edit: Edit) -> None:
    """Warns if a concept contains no word that the demo model knows."""
    if known_words().isdisjoint(re.findall(r"[a-z]+", str(edit.concept).lower())):
        warn(
            f"the demo model does not know any word in {edit.concept!r}, so this edit has no reliable effect; known"
            f" words include {', '.join(DEMO_WORDS)}"
        )


def parse_edit(text: str) -> Edit:
    """Parses an edit of the form `[-]WORDS[:NAME=VALUE,...]`. A leading minus means that the edit removes the concept.

    Raises:
        ValueError: there are no words, they contain misspelt settings, a setting is unknown, or a value is not a number
            or is out of range. The message suggests a spelling.
    """
    try:
        return _parsed(text)
    except _SpellingError as error:
        concept, tail = error.parts
        suggestion = corrected(concept, tail, _EXAMPLES)
        try:
            _parsed(suggestion or "")
        except ValueError:
            suggestion = None
        raise ValueError(f"--edit {_shown(text)}: {error}{_remedy(text, suggestion)}") from None
    except ValueError as error:
        raise ValueError(f"--edit {_shown(text)}: {error}") from None


class _SpellingError(ValueError):
    """Raised for an edit with misspelt settings.

    Args:
        concept, tail: the two parts of the edit, before and after the beginning of the settings.
    """

    def __init__(self, problem: str, concept: str, tail: str):
        super().__init__(problem)
        self.parts = concept, tail


def _remedy(text: str, suggestion: str | None) -> str:
    """Returns the end of the error message for an edit with misspelt settings."""
    if suggestion is None:
        remedy = f"; write settings as in glasses:scale=5. The settings are {', '.join(_SETTINGS)}."
    else:
        remedy = f"; did you mean {_shown(suggestion)}?"
    if _quoted_words(text.removeprefix("-")) is not None:
        return remedy
    minus = "-" if text.startswith("-") else ""
    words = minus + json.dumps(text.removeprefix("-"), ensure_ascii=False)
    return f"{remedy} If all of this is the concept, write it in quotation marks: --edit {_shown(words)}"


def _shown(text: str) -> str:
    return shlex.quote(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def _parsed(text: str) -> Edit:
    """Parses an edit as `parse_edit` does, with error messages that do not repeat the text.

    Raises:
        _SpellingError, ValueError: As for `parse_edit`.
    """
    removes = text.startswith("-")
    words, rest = _quoted_words(text.removeprefix("-")) or _plain_words(text)
    values: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in rest.split(","))):
        name, equals, value = (part.strip() for part in entry.partition("="))
        name = name.replace("-", "_")
        parts = text.removesuffix(rest), rest
        if not equals:
            raise _SpellingError(f"{entry!r} has no value, or no name", *parts)
        if name not in _SETTINGS:
            raise _SpellingError(f"{name!r} is unknown", *parts)
        if name in values:
            raise ValueError(f"{name!r} is given twice; give it once")
        if re.search(r"[=:;|\s]", value):
            raise _SpellingError(f"{name}={value} is not a single number", *parts)
        # The label keeps this setting apart from the option of the same name, as in --momentum-scale.
        values[name] = _SETTINGS[name].kind.parse(f"the setting {name}", value)
    if removes:
        if values.get("scale", 0) < 0:
            raise ValueError("the leading minus already removes the concept; give a positive scale")
        values["scale"] = -values.get("scale", Edit("").scale)
    return Edit(words, **values)


def _quoted_words(text: str) -> tuple[str, str] | None:
    """Returns the words in a JSON string and the settings that follow it. Returns None if there is no such string."""
    if not text.startswith('"'):
        return None
    try:
        words, end = json.JSONDecoder(strict=False).raw_decode(text)
    except ValueError:
        return None
    rest = text[end:]
    return (words, rest.removeprefix(":")) if not rest or rest.startswith(":") else None


def _plain_words(text: str) -> tuple[str, str]:
    """Returns the words and the settings of an edit whose words are not in quotation marks.

    Raises:
        ValueError: there are no words, or they contain misspelt settings.
    """
    words, colon, rest = text.rpartition(":")
    if not colon or "=" not in rest:
        words, rest = text, ""
    # The search takes quadratic time.
    begin = misspelt(words, _EXAMPLES) if len(words) <= _LONGEST_CHECKED else None
    if not words[:begin].removeprefix("-").strip().strip(":"):
        raise ValueError("there is no concept; write it first, as in glasses, -beard or glasses:scale=5")
    if words.strip()[0] in _DASHES or words.startswith("--"):
        concept = words.strip().lstrip(f"-{_DASHES}").strip()
        raise ValueError(f"a minus removes a concept; did you mean {_shown(f'-{concept}')}?")
    if begin is not None:
        raise _SpellingError("settings follow the concept and a colon, as NAME=VALUE", text[:begin], text[begin:])
    return words.removeprefix("-").strip(), rest


def format_edit(edit: Edit) -> str:
    """Writes an edit in the notation of `parse_edit`, with all settings that differ from those of `Edit`."""
    minus = "-" if edit.scale < 0 else ""
    values = {name: getattr(edit, name) for name in _SETTINGS} | {"scale": abs(edit.scale)}
    values = {name: value for name, value in values.items() if value not in (None, _SETTINGS[name].default)}
    listed = ",".join(f"{name}={_plain(value)}" for name, value in values.items())
    listed = f":{listed}" if listed else ""
    plain = f"{minus}{edit.concept}{listed}"
    try:
        if parse_edit(plain) == edit:
            return plain
    except ValueError:
        pass
    return f"{minus}{json.dumps(edit.concept, ensure_ascii=False)}{listed}"


def describe(edit: Edit) -> str:
    """Returns a line that describes an edit to the user."""
    begins = f"from call {edit.warmup}" + ("" if edit.cooldown is None else f" to {edit.cooldown}")
    sign = "-" if edit.scale < 0 else "+"
    return f"{sign} {edit.concept}: scale {abs(edit.scale):g}, threshold {edit.threshold:g}, {begins}"


def complete(edit: Edit, momentum: Mapping[str, Any]) -> str:
    """Returns all settings of an edit as human-readable text.

    Args:
        edit: the edit.
        momentum: the call's momentum settings, which apply unless the edit has its own.
    """
    values = {name: getattr(edit, name) for name in _SETTINGS}
    values |= {name: momentum.get(name) for name, value in values.items() if value is None and name in momentum}
    values |= {"scale": abs(edit.scale)} | ({"cooldown": "never"} if edit.cooldown is None else {})
    values = {name: "default" if value is None else value for name, value in values.items()}
    shown = (f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
    return f"{'-' if edit.scale < 0 else '+'} {edit.concept}: {', '.join(shown)}"


def _plain(value: float) -> str:
    return repr(value).removesuffix(".0")
