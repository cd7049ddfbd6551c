"""The settings that a sweep may give, derived from the declared arguments of calls and of `Edit`."""

from collections.abc import Mapping
from typing import Any

from sega_jax.method.arguments import Argument, arguments
from sega_jax.method.checks import brief
from sega_jax.method.guidance import Edit
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.systems.call import Call
from sega_jax.systems.registry import systems

# Settings of a call that are not arguments of it: its scheduler, and which of the edits act.
OTHERS = ("scheduler", "edits")


def call_settings(call: type[Call]) -> dict[str, Argument]:
    """Returns the arguments of a family's calls that a sweep may vary."""
    return {name: one for name, one in arguments(call).items() if one.sweep}


def edit_settings() -> Mapping[str, Argument]:
    """Returns the settings of an edit."""
    return arguments(Edit)


def names() -> list[str]:
    """Returns the settings of a call of any family."""
    found = dict.fromkeys(name for system in systems().values() for name in call_settings(system.call))
    return [*found, *OTHERS]


def known(key: str, edits: Mapping[str, Any], where: str) -> None:
    """Checks that there is a setting, "seed" or "glasses.scale".

    Args:
        edits: the sweep's, by their names.
        where: in the sweep, for errors.

    Raises:
        ValueError: there is no such setting or edit.
    """
    edit, _, name = key.rpartition(".")
    if edit and edit not in edits:
        listed = ", ".join(edits) or "none; describe it in a table [edits.NAME]"
        raise ValueError(
            f"{where}: {key!r} is of an edit {edit!r} that the sweep does not have; its edits are {listed}"
        )
    if name not in (edit_settings() if edit else names()):
        listed = ", ".join(f"{edit}.{setting}" for setting in edit_settings()) if edit else ", ".join(names())
        hint = "" if edit or name not in edit_settings() else f" (of an edit it is NAME.{name})"
        raise ValueError(f"{where}: {key!r} is unknown{hint}; the settings are {listed}")


def checked(key: str, value: Any, edits: Mapping[str, Any], where: str) -> Any:
    """Returns the value of a setting as the library uses it; of a call's it fits at least one family.

    Raises:
        TypeError, ValueError: as `known`, or a value of another type or range.
    """
    known(key, edits, where)
    edit, _, name = key.rpartition(".")
    said = f"{where}: {key}"
    if edit:
        return _of_edit(name, value, said)
    if name == "scheduler":
        return _scheduler(said, value)
    if name == "edits":
        return _acting(said, value, edits, where)
    error = None
    for system in systems().values():
        if name in (settings := call_settings(system.call)):
            try:
                return fixed(settings[name], value, said)
            except (TypeError, ValueError) as wrong:
                error = error or wrong
    raise error or ValueError(f"{said} is unknown")


def fixed(argument: Argument, value: Any, name: str) -> Any:
    """Returns the one value of an argument that a point has.

    Raises:
        TypeError, ValueError: it is of another type or range, or several.
    """
    return None if value is None and argument.default is None else argument.kind.check_one(name, value)


def _of_edit(name: str, value: Any, said: str) -> Any:
    # TOML has no null.
    if name == "cooldown" and value == "never":
        return None
    if name == "concept" and not isinstance(value, str):
        raise TypeError(f"{said}={brief(value)} should be words")
    return edit_settings()[name].check(value, said)


def _scheduler(said: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{said}={brief(value)} should be words")
    try:
        checked_scheduler(value)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None
    return value


def _acting(said: str, value: Any, edits: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{said}={brief(value)} should be a list of names of edits; [] is the picture without any")
    if astray := [one for one in value if one not in edits]:
        listed = ", ".join(edits) or "none"
        raise ValueError(f"{where}: edits names {astray[0]!r}, which is none; the sweep's edits are {listed}")
    # In one order, so that one set of them is one picture.
    return tuple(one for one in edits if one in value)
