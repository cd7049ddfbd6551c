"""Checks of arguments. Every error states the value and the expected type or range."""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sega_jax.method.naming import assignment
from sega_jax.method.naming import brief as brief

LARGEST = float(np.finfo(np.float32).max)  # the compiled programs compute in float32


def check_text(name: str, text: str) -> str:
    """Returns `text` if it is valid Unicode.

    Raises:
        ValueError: `text` is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{assignment(name, text)} is not valid Unicode; remove its surrogate characters") from None
    return text


def check_int(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """Checks that a value is an integer in [low, high], and returns it as an int.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is out of range.
    """
    limit = "" if low == -math.inf else f"at least {low}" if high == math.inf else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{assignment(name, value)} should be a whole number{limit and f', {limit}'}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{assignment(name, number)} should be {limit}")
    return number


def check_float(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Checks that a value is a finite number in [low, high], and returns it as a float.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is out of range, not finite, or beyond the range of float32.
    """
    limit = "a finite number"
    if low != -math.inf:
        limit = f"a number of at least {low}" if high == math.inf else f"a number in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{assignment(name, value)} should be {limit}")
    # Python compares integers of any size exactly, whereas comparing with a float16 would round the bound to float16.
    number: Any = value.item() if isinstance(value, np.generic) else value
    if not low <= number <= high or abs(number) == math.inf:
        raise ValueError(f"{assignment(name, value)} should be {limit}")
    if abs(number) > LARGEST:
        raise ValueError(f"{assignment(name, value)} is beyond the range of float32; use numbers up to {LARGEST:.2g}")
    return float(number)


def check_bool(name: str, value: Any) -> bool:
    """Checks that a value is True or False, and returns it as a bool.

    Raises:
        TypeError: `value` is not a bool.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{assignment(name, value)} should be True or False")
    return bool(value)


def check_choice(name: str, value: Any, known: Sequence[Any], also: str = "") -> Any:
    """Returns `value` if it is one of `known`.

    Args:
        also: A description of other accepted values, to append to the list in the error message.

    Raises:
        ValueError: `value` is not one of `known`. The message suggests a similar name, if there is one.
    """
    if not isinstance(value, str) or value not in known:
        names = [str(name) for name in known]
        hint = did_you_mean(value, names)
        raise ValueError(f"{assignment(name, value)} should be one of {', '.join(names)}{also}{hint}")
    return value


def did_you_mean(name: Any, known: Iterable[str], plain: Callable[[str], str] = str.lower) -> str:
    """Returns "; did you mean NAME?" with the known name that is most similar to a misspelt name, or "" if no name is
    similar.

    Args:
        plain: A function that reduces a name to its essential letters, ignoring optional parts and spelling variants.
    """
    if not isinstance(name, str) or not plain(name):
        return ""
    known = list(known)
    by_lower, by_plain = {key.lower(): key for key in known}, {plain(key): key for key in known}
    extensions = [key for key in by_plain if key.startswith(plain(name)) and len(plain(name)) > 1]
    nearest = [
        *(by_plain[key] for key in by_plain if key == plain(name)),
        *(by_plain[key] for key in sorted(extensions, key=len)),
        *(by_lower[key] for key in difflib.get_close_matches(name.lower(), by_lower, 1, 0.8)),
        *(by_plain[key] for key in difflib.get_close_matches(plain(name), by_plain, 1)),
    ]
    return f"; did you mean {nearest[0]}?" if nearest else ""


def is_sequence(value: Any) -> bool:
    """Returns whether a value is a sequence of entries. Strings and bytes are treated as single values."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
