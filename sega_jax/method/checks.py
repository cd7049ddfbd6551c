"""Checks of numbers that people give. Every error says what was given and what was expected."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


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
        raise ValueError(f"{name}={number} should be {limit}")
    return number


def check_float(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns a finite number in [low, high] as a float.

    Raises:
        TypeError: `value` is not a number.
        ValueError: it is not finite or out of range.
    """
    limit = "a finite number"
    if low != -math.inf:
        limit = f"a number of at least {low}" if high == math.inf else f"a number in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.number):
        raise TypeError(f"{name}={brief(value)} should be {limit}")
    # The abstract class numbers.Real has no type of comparisons with a float.
    if not (math.isfinite(value) and low <= value <= high):  # type: ignore[operator]
        raise ValueError(f"{name}={brief(value)} should be {limit}")
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    """Returns True or False as a bool.

    Raises:
        TypeError: `value` is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={brief(value)} should be True or False")
    return bool(value)


def check_choice(name: str, value: Any, known: Sequence[Any]) -> Any:
    """Returns a value that is one of `known`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={brief(value)} should be one of {', '.join(map(str, known))}")
    return value


def brief(value: Any) -> str:
    """Returns the value's repr in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
