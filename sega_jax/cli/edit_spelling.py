"""Finds misspelt settings in edits, such as "glasses:5" or "glasses;scale=5", and suggests the right notation."""

import difflib
import re
from collections.abc import Mapping

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# A number ends at a separator or at the end of the text, unlike the numbers in "9:30" and "5 kg".
_END = r"(?=\s*(?:[,;|:]|$))"
_SEPARATORS = " \t\n:;,|="
# Settings are often taken for positions, as in "glasses:5". The colon in "10:30" or "16:9" separates numbers instead.
_NUMBERS = re.compile(rf"(?<![\d\s:])\s*:\s*{_NUMBER}(?:\s*[,;|]\s*{_NUMBER})*\s*$")
# An equation such as "x=5" has a shorter name.
_EQUATION = re.compile(rf"(?<=[^\W\d_]{{3}})\s*=\s*{_NUMBER}\s*$")
_ASSIGNMENT = re.compile(rf"(?:^|[\s:;,|])\s*(?P<name>[A-Za-z][\w-]*)\s*=\s*(?:{_NUMBER}(?=[\s,;|:]|$))?")
_TOKEN = re.compile(rf"(?:(?P<name>[A-Za-z][\w-]*)\s*[=:\s]?\s*)?(?P<value>{_NUMBER})(?=[\s,;|:]|$)")


def misspelt(words: str, settings: Mapping[str, float]) -> int | None:
    """Returns the position where misspelt settings begin in words that should be a concept; None if there are none.

    Words with a colon are a concept if no number or name of a setting follows the colon, or if the colon is between
    two numbers.

    Args:
        settings: {name: an example of its value}.

    Example:
        >>> from sega_jax.cli.edit_spelling import misspelt
        >>> misspelt("glasses:5", {"scale": 5.0}), misspelt("a clock showing 10:30", {"scale": 5.0})
        (7, None)
    """
    names = "|".join(name.replace("_", "[_-]") for name in settings)
    patterns = [
        _NUMBERS,
        _EQUATION,
        re.compile(rf":\s*(?:{names})\s*$"),
        re.compile(rf"[:;,|]\s*(?:{names})(?:\s*:\s*|\s+){_NUMBER}{_END}"),
    ]
    begins = [match.start() for pattern in patterns if (match := pattern.search(words))]
    for match in _ASSIGNMENT.finditer(words):
        name = match["name"]
        # A name that is only similar to a setting needs a number, because "shade=green" may be words.
        if _exact(name) in settings or (match[0][-1].isdigit() and similar(name, settings) is not None):
            begins.append(match.start())
    return min(begins, default=None)


def corrected(concept: str, tail: str, settings: Mapping[str, float]) -> str | None:
    """Returns the notation for a concept and misspelt settings; None if it is unclear which settings are meant.

    Args:
        concept: the part of the edit before the settings, such as "-glasses".
        tail: the part that should have been settings, such as ":5".
        settings: {name: an example of its value}.

    Example:
        >>> from sega_jax.cli.edit_spelling import corrected
        >>> corrected("glasses", ";scle=5,threshold:0.9", {"scale": 5.0, "threshold": 0.9})
        'glasses:scale=5,threshold=0.9'
    """
    name = _exact(tail.strip(_SEPARATORS))
    values = {name: f"{settings[name]:g}"} if name in settings else {}
    for match in [] if values else _TOKEN.finditer(tail):
        given = "scale" if match["name"] is None else similar(match["name"], settings)
        if given is None or given in values:
            return None
        values[given] = match["value"]
    rest = "" if name in settings else _TOKEN.sub("", tail).strip(_SEPARATORS)
    concept = concept.rstrip(_SEPARATORS)
    if rest or not values or not concept.removeprefix("-"):
        return None
    return f"{concept}:{','.join(f'{name}={value}' for name, value in values.items())}"


def similar(name: str, settings: Mapping[str, float]) -> str | None:
    """Returns the setting that has the given name or a similar one."""
    if (exact := _exact(name)) in settings:
        return exact
    return next(iter(difflib.get_close_matches(exact, settings, 1, 0.8)), None)


def _exact(name: str) -> str:
    return name.lower().replace("-", "_")
