"""Shows the values of settings as text, and finds the values that a text names."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORDS = {"true": True, "false": False, "never": None}


def show(value: Any) -> str:
    """Formats a setting's value for display.

    Args:
        value: a number, a string, None, or a list or tuple of these.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.show(4.0), sweep.show(None), sweep.show(["hat", "glasses"])
        ('4', 'never', 'hat + glasses')
    """
    if value is None:
        return "never"
    if isinstance(value, tuple | list):
        # Edit names are joined with " + ", several numbers with ", ".
        words = all(isinstance(one, str) for one in value)
        return (" + " if words else ", ").join(map(show, value)) or "none"
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def exact(value: Any) -> str:
    """Returns a text that names a value and no other value; see `find`.

    Example:
        >>> from sega_jax.sweep.reporting.values import exact
        >>> exact(5.0), exact("5"), exact(None), exact(("hat", "glasses"))
        ('5', '"5"', 'never', '["hat", "glasses"]')
    """
    if value is None:
        return "never"
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0")
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return str(value)


def comparable(value: Any) -> Any:
    """Returns a value in a form in which only equal settings are equal. Unlike in Python, True differs from 1, and a
    list equals a tuple with the same entries.

    Example:
        >>> from sega_jax.sweep.reporting.values import comparable
        >>> comparable(5) == comparable(5.0), comparable(True) == comparable(1), comparable([1]) == comparable((1,))
        (True, False, True)
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(comparable, value))
    return isinstance(value, bool), value


def find(given: Any, values: Sequence[Any], *, as_text: bool = False) -> list[Any]:
    """Returns the values that a given value or text names.

    These are the values that equal the given value. If there are none, a string is read as in a sweep's file: a number
    names the equal number, in any notation; the words true, false and never name True, False and None; text in
    quotation marks names a string; and a list in brackets names a list. If there is no such value either, the string
    names the values that `show` displays as this text.

    Args:
        given: a value or a text.
        values: the values to choose from.
        as_text: whether to read strings only as in a sweep's file, so that "5" names 5 even if a value equals "5".

    Returns:
        One value. If there is none, or several values are displayed as this text, the list is empty or longer.

    Example:
        >>> from sega_jax.sweep.reporting.values import find
        >>> values = [5.0, "5", None, ("hat", "glasses")]
        >>> find("5", values), find("5e0", values), find("never", values), find("hat + glasses", values)
        (['5'], [5.0], [None], [('hat', 'glasses')])
        >>> find("5", values, as_text=True), find('"5"', values, as_text=True)
        ([5.0], ['5'])
    """
    if not isinstance(given, str):
        return _equal(given, values)
    literally = [] if as_text else _equal(given, values)
    return literally or _equal(_literal(given), values) or [value for value in values if show(value) == given]


def _equal(wanted: Any, values: Sequence[Any]) -> list[Any]:
    wanted = comparable(wanted)
    return [value for value in values if comparable(value) == wanted]


def _literal(text: str) -> Any:
    """Returns the value that a text stands for in a sweep's file; for other texts, the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text.startswith(('"', "[")):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text
