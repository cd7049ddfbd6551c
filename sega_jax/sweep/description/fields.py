"""The settings that a sweep may give, derived from the declared arguments of calls and of `Edit`."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sega_jax.method.argument_kinds import Kind
from sega_jax.method.arguments import Argument, arguments
from sega_jax.method.checks import brief
from sega_jax.method.guidance import Edit
from sega_jax.pipelines.adapter_options import Files
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.load_options import ADAPTERS, LoadOptions
from sega_jax.sweep.description import stages
from sega_jax.systems.base import System
from sega_jax.systems.call import Call
from sega_jax.systems.registry import systems
from sega_jax.text.files import absolute_path

# Settings of a picture that are not arguments of its call: besides these, its scheduler, and which of the edits act.
# In a cascade also which of the stages the edits guide.
OTHERS = ("scheduler", "edits", "edited", *ADAPTERS)


def call_settings(call: type[Call]) -> dict[str, Argument]:
    """Returns the arguments of a family's calls that a sweep may vary."""
    return {name: one for name, one in arguments(call).items() if one.sweep}


def edit_settings() -> Mapping[str, Argument]:
    """Returns the settings of an edit."""
    return arguments(Edit)


def adapter_kinds() -> dict[str, Files]:
    """Returns the kinds of files that are added to a checkpoint's networks, by the names of the settings."""
    declared = arguments(LoadOptions)
    return {name: kind for name in ADAPTERS if isinstance(kind := declared[name].kind, Files)}


def names() -> list[str]:
    """Returns the settings of a call of any family."""
    return [*_names(systems().values()), *OTHERS]


def _names(families: Iterable[System]) -> list[str]:
    return list(dict.fromkeys(name for system in families for name in call_settings(system.call)))


def known(key: str, edits: Mapping[str, Any], where: str) -> None:
    """Checks that there is a setting, "seed" or "glasses.scale".

    Args:
        edits: the sweep's, by their names.
        where: in the sweep, for errors.

    Raises:
        ValueError: there is no such setting or edit.
    """
    stage, name = stages.split(key)
    if stage:
        own = [name for name in [*_names(stages.later_stages()[stage]), "scheduler", *ADAPTERS] if stages.is_own(name)]
        if name not in own:
            raise ValueError(f"{where}: {key!r} is unknown; the settings of {stage} are {', '.join(own)}")
        return
    edit, _, name = key.rpartition(".")
    if edit == FIRST:
        raise ValueError(f"{where}: {key!r} is of the first stage, whose settings have no prefix; say {name!r}")
    if edit and edit not in edits:
        listed = ", ".join(edits) or "none; describe it in a table [edits.NAME]"
        raise ValueError(
            f"{where}: {key!r} is of an edit {edit!r} that the sweep does not have; its edits are {listed}"
        )
    if name not in (edit_settings() if edit else names()):
        listed = ", ".join(f"{edit}.{setting}" for setting in edit_settings()) if edit else ", ".join(names())
        hint = "" if edit or name not in edit_settings() else f" (of an edit it is NAME.{name})"
        raise ValueError(f"{where}: {key!r} is unknown{hint}; the settings are {listed}")


def kind_of(key: str) -> Kind | None:
    """Returns the kind of the values of a setting of calls or of adapters; None for other settings."""
    stage, name = stages.split(key)
    if name in ADAPTERS:
        return adapter_kinds()[name]
    families = stages.later_stages()[stage] if stage else systems().values()
    return next((call_settings(one.call)[name].kind for one in families if name in call_settings(one.call)), None)


def checked(key: str, value: Any, edits: Mapping[str, Any], where: str, folder: Path = Path()) -> Any:
    """Returns the value of a setting as the library uses it; of a call's it fits at least one family.

    Args:
        folder: where relative paths start from.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `known`, or a value of another type or range.
    """
    known(key, edits, where)
    stage, name = stages.split(key)
    edit, _, name = ("", "", name) if stage else key.rpartition(".")
    said = f"{where}: {key}"
    if edit:
        return _of_edit(name, value, said)
    if name == "scheduler":
        return _scheduler(said, value, folder)
    if name == "edits":
        return _acting(said, value, edits, where)
    if name == "edited":
        return _guided(said, value)
    if name in ADAPTERS:
        kind = adapter_kinds()[name]
        return kind.check_one(said, kind.located(said, () if value is None else value, folder))
    error = None
    for system in stages.later_stages()[stage] if stage else systems().values():
        if name in (settings := call_settings(system.call)):
            try:
                return fixed(settings[name], settings[name].kind.located(said, value, folder), said)
            except (TypeError, ValueError) as wrong:
                error = error or wrong
    raise error or ValueError(f"{said} is unknown")


def fixed(argument: Argument, value: Any, name: str) -> Any:
    """Returns the one value of an argument that a point has.

    Raises:
        TypeError, ValueError: it is of another type or range, or several.
    """
    return None if value is None and argument.default is None else argument.kind.check_one(name, value)


def _guided(said: str, value: Any) -> tuple[str, ...]:
    known = [FIRST, *stages.later_stages()]
    if not isinstance(value, list | tuple) or not all(one in known for one in value):
        raise ValueError(f"{said}={brief(value)} should be a list of stages that the edits guide: {', '.join(known)}")
    return tuple(one for one in known if one in value)


def _of_edit(name: str, value: Any, said: str) -> Any:
    # TOML has no null.
    if name == "cooldown" and value == "never":
        return None
    if name == "concept" and not isinstance(value, str):
        raise TypeError(f"{said}={brief(value)} should be a string")
    return edit_settings()[name].check(value, said)


def _scheduler(said: str, value: Any, folder: Path) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{said}={brief(value)} should be a string")
    if os.path.isdir(path := absolute_path(value, folder)):
        value = path
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
