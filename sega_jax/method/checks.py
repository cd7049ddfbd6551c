"""Checks of numbers that people give. Every error says what was given and what was expected."""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

LARGEST = float(np.finfo(np.float32).max)  # programs compute in float32


def check_int(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """Returns a whole number in [low, high] as an int.

    Raises:
        TypeError: `value` is not a whole number.
        ValueError: it is out of range.
    """
    limit = "" if low == -math.inf else f"at least {low}" if high == math.inf else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={brief(value)} should be a whole number{limit and f', {limit}'}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name}={brief(number)} should be {limit}")
    return number


def check_float(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns a finite number in [low, high] as a float.

    Raises:
        TypeError: `value` is not a number.
        ValueError: it is not finite, out of range, or beyond the range of float32.
    """
    limit = "a finite number"
    if low != -math.inf:
        limit = f"a number of at least {low}" if high == math.inf else f"a number in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={brief(value)} should be {limit}")
    # Python compares whole numbers of any size, while float16 would round what it is compared with.
    number: Any = value.item() if isinstance(value, np.generic) else value
    if not low <= number <= high or abs(number) == math.inf:
        raise ValueError(f"{name}={brief(value)} should be {limit}")
    if abs(number) > LARGEST:
        raise ValueError(f"{name}={brief(value)} is beyond the range of float32; give at most {LARGEST:.2g} in size")
    return float(number)


def check_bool(name: str, value: Any) -> bool:
    """Returns True or False as a bool.

    Raises:
        TypeError: `value` is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={brief(value)} should be True or False")
    return bool(value)


def check_choice(name: str, value: Any, known: Sequence[Any], also: str = "") -> Any:
    """Returns a value that is one of `known`.

    Args:
        also: what else may be given, for the error.

    Raises:
        ValueError: it is not; the message has a similar one, if there is any.
    """
    if not isinstance(value, str) or value not in known:
        names = [str(one) for one in known]
        hint = did_you_mean(value, names)
        raise ValueError(f"{name}={brief(value)} should be one of {', '.join(names)}{also}{hint}")
    return value


def did_you_mean(name: Any, known: Iterable[str], plain: Callable[[str], str] = str.lower) -> str:
    """Returns "; did you mean NAME?" for the known name that a misspelt one resembles, and "" where none does.

    Args:
        plain: returns a name without what people leave out or spell in several ways.
    """
    if not isinstance(name, str) or not plain(name):
        return ""
    known = list(known)
    whole, names = {one.lower(): one for one in known}, {plain(one): one for one in known}
    begins = [one for one in names if one.startswith(plain(name)) and len(plain(name)) > 1]
    nearest = [
        *(names[one] for one in names if one == plain(name)),
        *(names[one] for one in sorted(begins, key=len)),
        *(whole[one] for one in difflib.get_close_matches(name.lower(), whole, 1, 0.8)),
        *(names[one] for one in difflib.get_close_matches(plain(name), names, 1)),
    ]
    return f"; did you mean {nearest[0]}?" if nearest else ""


def is_sequence(value: Any) -> bool:
    """Tells whether a value is a sequence of entries; words and bytes are single values."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def brief(value: Any) -> str:
    """Returns the value's repr in at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole numbers of more than 4300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
