"""The settings that a sweep may say, and what each may be."""

from collections.abc import Callable, Mapping
from typing import Any

from sega_jax.method.guidance import NEVER, SEMANTICS, SUPPORTS
from sega_jax.method.schedules.spacing import NAMED
from sega_jax.pipelines.batch import number, whole
from sega_jax.pipelines.components import checked_scheduler


def _words(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{key}={brief(value)} should be words")
    return value


def _whole(low: int, high: int) -> Callable[[str, Any], int]:
    return lambda key, value: whole(key, value, low, high)


def _number(*limits: float) -> Callable[[str, Any], float]:
    return lambda key, value: number(key, value, *limits)


def _steps(key: str, value: Any) -> int | str:
    if isinstance(value, str) and value not in NAMED:
        raise ValueError(f"{key}={brief(value)} should be a whole number of steps, or one of {', '.join(NAMED)}")
    return value if isinstance(value, str) else whole(key, value, 1)


def _cooldown(key: str, value: Any) -> int | None:
    # TOML has no null.
    return None if value in (None, "never") else whole(key, value, 0, NEVER)


def _one_of(*known: str) -> Callable[[str, Any], str]:
    def check(key: str, value: Any) -> str:
        if value not in known:
            raise ValueError(f"{key}={brief(value)} should be one of {', '.join(known)}")
        return value

    return check


def _scheduler(key: str, value: Any) -> str:
    try:
        checked_scheduler(_words(key, value))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return value


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{key}={brief(value)} should be a list of names of edits; [] is the picture without any")
    return tuple(value)


_SHARE, _SIDE = _number(0, 1), _whole(1, 2**20)
# Of a call: what `Pipeline` takes under these names; its scheduler; and which of the edits act.
CALL: Mapping[str, Callable[[str, Any], Any]] = {
    "prompt": _words,
    "negative_prompt": _words,
    "seed": _whole(0, 2**32 - 1),
    "steps": _steps,
    "guidance_scale": _number(),
    "eta": _SHARE,
    "height": _SIDE,
    "width": _SIDE,
    "momentum_scale": _SHARE,
    "momentum_beta": _SHARE,
    "semantics": _one_of(*SEMANTICS),
    "support": _one_of(*SUPPORTS),
    "scheduler": _scheduler,
    "edits": _names,
}
# Of a concept: the fields of `Edit`.
EDIT: Mapping[str, Callable[[str, Any], Any]] = {
    "concept": _words,
    "scale": _number(),
    "threshold": _SHARE,
    "warmup": _whole(0, NEVER),
    "cooldown": _cooldown,
    "weight": _number(0),
    "momentum_scale": _SHARE,
    "momentum_beta": _SHARE,
}


def known(key: str, edits: Mapping[str, Any], where: str) -> Callable[[str, Any], Any]:
    """The check of a setting, "seed" or "glasses.scale".

    Args:
        edits: the sweep's, by their names.
        where: in the sweep, for messages.

    Raises:
        ValueError: no such setting or edit.
    """
    edit, _, name = key.rpartition(".")
    if edit and edit not in edits:
        names = ", ".join(edits) or "none; describe it in a table [edits.NAME]"
        raise ValueError(f"{where}: {key!r} is of an edit {edit!r} that the sweep does not have; its edits are {names}")
    if name not in (EDIT if edit else CALL):
        names = ", ".join(f"{edit}.{setting}" for setting in EDIT) if edit else ", ".join(CALL)
        hint = "" if edit or name not in EDIT else f" (of an edit it is NAME.{name})"
        raise ValueError(f"{where}: {key!r} is unknown{hint}; the settings are {names}")
    return (EDIT if edit else CALL)[name]


def checked(key: str, value: Any, edits: Mapping[str, Any], where: str) -> Any:
    """The value of a setting as the library takes it.

    Raises:
        TypeError, ValueError: as of `known`, or a value of another type or range.
    """
    value = known(key, edits, where)(f"{where}: {key}", value)
    if key == "edits":
        if astray := [one for one in value if one not in edits]:
            names = ", ".join(edits) or "none"
            raise ValueError(f"{where}: edits names {astray[0]!r}, which is none; the sweep's edits are {names}")
        # In one order, so that one set of them is one picture.
        value = tuple(one for one in edits if one in value)
    return value


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
