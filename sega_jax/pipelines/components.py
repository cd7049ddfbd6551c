"""Functions that check and convert replacements for a checkpoint's scheduler and networks."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from sega_jax.method.checks import did_you_mean
from sega_jax.method.naming import assignment
from sega_jax.method.schedules import FAMILIES, Scheduler, from_config, of_torch
from sega_jax.method.schedules.families import TRAININGS, plain
from sega_jax.text.files import read_json

M = TypeVar("M")


def as_scheduler(value: Any, config: Mapping[str, Any] | None = None) -> Scheduler:
    """Converts a scheduler in any accepted form to a `Scheduler`.

    Args:
        value: A `Scheduler`; a diffusers class or its name, which takes its options from `config`, as in diffusers'
            `from_config`; a config with a `_class_name`; a folder with `scheduler_config.json`, or the checkpoint
            folder that contains it; or a diffusers scheduler object.
        config: The config of the scheduler to replace, if any.

    Raises:
        TypeError: The value has none of these forms.
        ValueError: The scheduler, an option or an option's value is not supported.
        CheckpointError: The folder has no config, or the config is broken.
    """
    if isinstance(value, Scheduler):
        return value
    if isinstance(value, type) and value.__name__ in FAMILIES:
        value = value.__name__
    if isinstance(value, str) and value in FAMILIES:
        if config is None:
            raise ValueError(
                f"{assignment('scheduler', value)} is only a class name, and there is no previous config with betas;"
                " give a config"
            )
        # Options left at the old class's defaults are dropped, so that the new class's defaults apply.
        config = of_torch(config)
        defaults = config.get("_use_default_values") or []
        taken = {key: option for key, option in config.items() if key not in (*defaults, "_use_default_values")}
        check_training(value, config)
        return from_config({**taken, "_class_name": value}, strict=False)
    if isinstance(value, Mapping):
        if "_class_name" not in value:
            raise ValueError(f"the config {str(dict(value))[:80]} has no _class_name; add one of {', '.join(FAMILIES)}")
        return from_config(value)
    if isinstance(value, str | os.PathLike):
        folder = Path(os.path.expanduser(value))
        if not str(value) or not folder.exists():
            hint = did_you_mean(value, FAMILIES, plain)
            raise ValueError(
                f"{assignment('scheduler', str(value))} is neither a folder nor a scheduler class{hint or '.'} The"
                f" classes are {', '.join(FAMILIES)}"
            )
        inner = folder / "scheduler"
        path = inner if inner.is_dir() else folder
        return from_config(read_json(path / "scheduler_config.json" if path.is_dir() else path))
    if isinstance(config := getattr(value, "config", None), Mapping):
        return from_config({**config, "_class_name": type(value).__name__})
    raise TypeError(
        f"{assignment('scheduler', value)} should be a class name ({', '.join(FAMILIES)}), a config, or a folder with"
        " one"
    )


def check_training(name: str, own: Mapping[str, Any] | None) -> None:
    """Checks that a scheduler class is meant for models trained in the same way as the checkpoint.

    Args:
        name: The name of the scheduler class.
        own: The config of the checkpoint's scheduler; None if the checkpoint has none.

    Raises:
        ValueError: The two classes are meant for differently trained models.
    """
    before = None if own is None else own.get("_class_name")
    if before not in FAMILIES or (training := FAMILIES[before].training) == FAMILIES[name].training:
        return
    suitable = ", ".join(other for other, family in FAMILIES.items() if family.training == training)
    raise ValueError(
        f"{name} samples {TRAININGS[FAMILIES[name].training]}, but this checkpoint's scheduler, {before}, is for"
        f" {TRAININGS[training]}; use one of {suitable}"
    )


def checked_scheduler(value: Any) -> Any:
    """Checks the option `scheduler` as far as possible without the checkpoint.

    Returns:
        The value itself if it is None, a class or a class name, because a class needs the config of the checkpoint's
        scheduler; otherwise the `Scheduler`.

    Raises:
        TypeError, ValueError, CheckpointError: As for `as_scheduler`.
    """
    name = getattr(value, "__name__", value)
    return value if name is None or (isinstance(name, str) and name in FAMILIES) else as_scheduler(value)


def as_module(name: str, value: Any, kind: type[M]) -> M:
    """Checks that a value is a loaded network of the expected class, and returns it.

    Raises:
        TypeError: The value has the wrong class, or is a network with shapes instead of parameters.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name}={type(value).__name__} should be a {kind.__name__} from another pipeline (pipe.models.{name})"
        )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} has no weights, only shapes; pass a network from a loaded pipeline")
    return value
