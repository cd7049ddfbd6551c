"""The settings of a sweep, derived from the declared arguments of calls and of `Edit`."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sega_jax.method.argument_kinds import Kind
from sega_jax.method.arguments import Argument, arguments
from sega_jax.method.checks import brief, did_you_mean
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

# Settings that are not arguments of a call: the scheduler, the active edits, the adapters, and, in a cascade, the
# stages that the edits guide ("edited").
OTHERS = ("scheduler", "edits", "edited", *ADAPTERS)


def call_settings(call: type[Call]) -> dict[str, Argument]:
    """Returns the arguments of a family's calls that a sweep may vary."""
    return {name: one for name, one in arguments(call).items() if one.sweep}


def edit_settings() -> Mapping[str, Argument]:
    """Returns the arguments of `Edit`, which are the settings of an edit."""
    return arguments(Edit)


def adapter_kinds() -> dict[str, Files]:
    """Returns the kinds of adapter files (LoRAs and textual inversions), {setting: kind}."""
    declared = arguments(LoadOptions)
    return {name: kind for name in ADAPTERS if isinstance(kind := declared[name].kind, Files)}


def names() -> list[str]:
    """Returns the names of all call settings, for all families."""
    return [*_names(systems().values()), *OTHERS]


def _names(families: Iterable[System]) -> list[str]:
    return list(dict.fromkeys(name for system in families for name in call_settings(system.call)))


def check_known(key: str, edits: Mapping[str, Any], where: str) -> None:
    """Checks that a setting exists, such as "seed" or "glasses.scale".

    Args:
        edits: the sweep's edits, {name: edit}.
        where: the part of the sweep to name in error messages.

    Raises:
        ValueError: there is no such setting or edit.
    """
    stage, name = stages.split(key)
    if stage:
        own = [name for name in [*_names(stages.later_stages()[stage]), "scheduler", *ADAPTERS] if stages.is_own(name)]
        if name not in own:
            hint = did_you_mean(name, own)
            raise ValueError(f"{where}: {key!r} is unknown{hint}; the settings of {stage} are {', '.join(own)}")
        return
    edit, _, name = key.rpartition(".")
    if edit == FIRST:
        raise ValueError(f"{where}: {key!r} belongs to the first stage, whose settings have no prefix; use {name!r}")
    if edit and edit not in edits:
        listed = (", ".join(edits) + did_you_mean(edit, edits)) or "none; describe the edit in a table [edits.NAME]"
        raise ValueError(
            f"{where}: {key!r} belongs to the edit {edit!r}, which the sweep does not have; its edits are {listed}"
        )
    if name not in (edit_settings() if edit else names()):
        known = [f"{edit}.{setting}" for setting in edit_settings()] if edit else list(names())
        hint = did_you_mean(key, known) if edit or name not in edit_settings() else f" (for an edit, use NAME.{name})"
        listed = ", ".join(known)
        raise ValueError(f"{where}: {key!r} is unknown{hint}; the settings are {listed}")


def kind_of(key: str) -> Kind | None:
    """Returns the kind of value that a call setting or an adapter setting has; None for any other setting."""
    stage, name = stages.split(key)
    if name in ADAPTERS:
        return adapter_kinds()[name]
    families = stages.later_stages()[stage] if stage else systems().values()
    return next((call_settings(one.call)[name].kind for one in families if name in call_settings(one.call)), None)


def check_setting(key: str, value: Any, edits: Mapping[str, Any], where: str, folder: Path = Path()) -> Any:
    """Checks a setting's value and returns it in the form that the library uses.

    The value of a call setting must be valid for at least one family.

    Args:
        folder: the folder that relative paths start from.

    Raises:
        FileNotFoundError, TypeError, ValueError: the setting is unknown, or the value has the wrong type or is out of
            range.
    """
    check_known(key, edits, where)
    stage, name = stages.split(key)
    edit, _, name = ("", "", name) if stage else key.rpartition(".")
    label = f"{where}: {key}"
    if edit:
        return _edit_value(name, value, label)
    if name == "scheduler":
        return _scheduler(label, value, folder)
    if name == "edits":
        return _active_edits(label, value, edits, where)
    if name == "edited":
        return _guided_stages(label, value)
    if name in ADAPTERS:
        kind = adapter_kinds()[name]
        return kind.check_one(label, kind.located(label, () if value is None else value, folder))
    error = None
    for system in stages.later_stages()[stage] if stage else systems().values():
        if name in (settings := call_settings(system.call)):
            try:
                return check_single(settings[name], settings[name].kind.located(label, value, folder), label)
            except (TypeError, ValueError) as mismatch:
                error = error or mismatch
    raise error or ValueError(f"{label} is unknown")


def check_single(argument: Argument, value: Any, name: str) -> Any:
    """Checks that an argument has a single value, and returns it.

    Raises:
        TypeError, ValueError: the value has the wrong type, is out of range, or is a list of several values.
    """
    return None if value is None and argument.default is None else argument.kind.check_one(name, value)


def _guided_stages(label: str, value: Any) -> tuple[str, ...]:
    known = [FIRST, *stages.later_stages()]
    if not isinstance(value, list | tuple) or not all(one in known for one in value):
        raise ValueError(
            f"{label}={brief(value)} should be a list of the stages that the edits guide: {', '.join(known)}"
        )
    return tuple(one for one in known if one in value)


def _edit_value(name: str, value: Any, label: str) -> Any:
    # TOML has no null, so a sweep writes "never" for None.
    if name == "cooldown" and value == "never":
        return None
    if name == "concept" and not isinstance(value, str):
        raise TypeError(f"{label}={brief(value)} should be a string")
    return edit_settings()[name].check(value, label)


def _scheduler(label: str, value: Any, folder: Path) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{label}={brief(value)} should be the name of a scheduler or the path of its folder")
    if os.path.isdir(path := absolute_path(value, folder)):
        value = path
    try:
        checked_scheduler(value)
    except ValueError as error:
        # The message starts with the name that ends the label.
        raise ValueError(f"{label.removesuffix('scheduler')}{error}") from None
    return value


def _active_edits(label: str, value: Any, edits: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{label}={brief(value)} should be a list of edit names; use [] for the picture without edits")
    if unknown := [name for name in value if name not in edits]:
        listed = ", ".join(edits) or "none"
        raise ValueError(f"{where}: edits names the unknown edit {unknown[0]!r}; the sweep's edits are {listed}")
    # A fixed order, so that the same set of edits always describes the same picture.
    return tuple(name for name in edits if name in value)
