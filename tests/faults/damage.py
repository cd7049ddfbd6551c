"""Functions that return a `Damage`, which maps an object in the library to a faulty version of the object.

Most objects are functions or methods; for a method, argument 0 is `self`. Each docstring says what the damage does. No
damage reads or rewrites source text, so faults keep working when variables are renamed or code is moved.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax.numpy as jnp
import numpy as np

Damage = Callable[[Any], Any]


def override(**options: Any) -> Damage:
    """Calls the function with the given keyword arguments, which override those that the caller passes."""

    def change(function):
        return wraps(function)(lambda *args, **kwargs: function(*args, **kwargs | options))

    return change


def argument(position: int, by: Callable[[Any], Any]) -> Damage:
    """Changes one argument before the call, whether it is passed by position or by name."""

    def change(function):
        name = list(inspect.signature(function).parameters)[position]

        @wraps(function)
        def damaged(*args, **kwargs):
            if position < len(args):
                args = (*args[:position], by(args[position]), *args[position + 1 :])
            else:
                kwargs[name] = by(kwargs[name])
            return function(*args, **kwargs)

        return damaged

    return change


def arguments(by: Callable[..., tuple]) -> Damage:
    """Changes all positional arguments before the call; `by` maps the old arguments to the new ones."""

    def change(function):
        return wraps(function)(lambda *args, **kwargs: function(*by(*args), **kwargs))

    return change


def result(by: Callable[[Any], Any]) -> Damage:
    """Changes the result of the call."""

    def change(function):
        return wraps(function)(lambda *args, **kwargs: by(function(*args, **kwargs)))

    return change


def results(by: Callable[..., Any]) -> Damage:
    """Changes the result of the call, which is a tuple, to `by(*result)`."""
    return result(lambda values: by(*values))


def scaled(position: int, factor: float) -> Damage:
    """Multiplies a positional argument by a factor."""
    return argument(position, lambda value: value * factor)


def instead(value: Any) -> Damage:
    """Replaces the object with another constant or function."""
    return lambda _: value


def unchanged(position: int = 0) -> Damage:
    """Replaces the function with one that returns an argument unchanged."""
    return instead(lambda *args, **_: args[position])


def fields(**changes: Callable[[Any], Any]) -> Damage:
    """Changes fields of the named tuple that the function returns."""
    return result(lambda value: replaced(value, **changes))


def replaced(value: Any, **changes: Callable[[Any], Any]) -> Any:
    """Returns a copy of the named tuple with changed fields."""
    return value._replace(**{name: by(getattr(value, name)) for name, by in changes.items()})


def layer(name: str, by: Callable[[Any, Any], Any]) -> Damage:
    """Damages a module's `__init__`, so that its layer `name` returns `by(x, y)` for input x and correct output y.

    The layer keeps its parameters and their names.
    """

    def change(init):
        @wraps(init)
        def damaged(self, *args, **kwargs):
            init(self, *args, **kwargs)
            sound = getattr(self, name)
            sound.__class__ = _changed(type(sound), by)

        return damaged

    return change


def _changed(kind: type, by: Callable[[Any, Any], Any]) -> type:
    def call(self, x, *args, **kwargs):
        return by(x, kind.__call__(self, x, *args, **kwargs))

    return type(f"Damaged{kind.__name__}", (kind,), {"__call__": call})


def skipped(name: str) -> Damage:
    """Damages a module's `__init__`, so that the module's layer `name` returns its input."""
    return layer(name, lambda x, y: x)


def halves(y: Any) -> Any:
    """Swaps the two halves of an array's last axis."""
    return jnp.roll(y, y.shape[-1] // 2, -1)


def earlier(column: np.ndarray) -> np.ndarray:
    """Moves a table's column up by one row and repeats its last entry."""
    return np.concatenate([column[1:], column[-1:]])
