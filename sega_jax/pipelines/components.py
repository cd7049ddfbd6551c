"""What a pipeline can be given in place of its checkpoint's own: a scheduler by any name, a network of another."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from sega_jax.method.checks import did_you_mean
from sega_jax.method.schedules import FAMILIES, Scheduler, from_config, of_torch
from sega_jax.method.schedules.families import TRAININGS, plain
from sega_jax.text.files import read_json

M = TypeVar("M")


def as_scheduler(value: Any, config: Mapping[str, Any] | None = None) -> Scheduler:
    """A scheduler from what names one.

    Args:
        value: a `Scheduler`; a class of diffusers' or its name, which takes `config` over as diffusers'
            `from_config` does; a config with a `_class_name`; a folder with `scheduler_config.json` (or a
            checkpoint's, above it); or a scheduler object of diffusers.
        config: of the scheduler before; None where there was none.

    Raises:
        TypeError: it is none of these.
        ValueError: a scheduler, option or value that is not supported, or a folder without a config.
    """
    if isinstance(value, Scheduler):
        return value
    if isinstance(value, type) and value.__name__ in FAMILIES:
        value = value.__name__
    if isinstance(value, str) and value in FAMILIES:
        if config is None:
            raise ValueError(f"scheduler={value!r} has no config whose betas it could take over; give a config")
        # What was a default of another class was not chosen; what is another's own means nothing here.
        config = of_torch(config)
        defaults = config.get("_use_default_values") or []
        taken = {key: option for key, option in config.items() if key not in (*defaults, "_use_default_values")}
        check_training(value, config)
        return from_config({**taken, "_class_name": value}, strict=False)
    if isinstance(value, Mapping):
        if "_class_name" not in value:
            raise ValueError(f"the config {str(dict(value))[:80]} has no _class_name, one of {', '.join(FAMILIES)}")
        return from_config(value)
    if isinstance(value, str | os.PathLike):
        folder = Path(os.path.expanduser(value))
        if not str(value) or not folder.exists():
            hint = did_you_mean(value, FAMILIES, plain)
            raise ValueError(
                f"scheduler={str(value)!r} is no folder and no class of a scheduler{hint or '.'} There are"
                f" {', '.join(FAMILIES)}"
            )
        inner = folder / "scheduler"
        path = inner if inner.is_dir() else folder
        return from_config(read_json(path / "scheduler_config.json" if path.is_dir() else path))
    if isinstance(config := getattr(value, "config", None), Mapping):
        return from_config({**config, "_class_name": type(value).__name__})
    raise TypeError(
        f"scheduler={str(value)[:80]} should be a class name ({', '.join(FAMILIES)}), a config, or a folder with one"
    )


def check_training(name: str, own: Mapping[str, Any] | None) -> None:
    """Checks that a scheduler samples networks that were trained as a checkpoint's own scheduler says.

    Args:
        name: of the scheduler's class.
        own: the config of the checkpoint's scheduler; None where it has none.

    Raises:
        ValueError: it does not.
    """
    before = None if own is None else own.get("_class_name")
    if before not in FAMILIES or (training := FAMILIES[before].training) == FAMILIES[name].training:
        return
    fitting = ", ".join(other for other, family in FAMILIES.items() if family.training == training)
    raise ValueError(
        f"{name} samples {TRAININGS[FAMILIES[name].training]}, and this checkpoint's scheduler, {before}, is for"
        f" {TRAININGS[training]}; take one of {fitting}"
    )


def checked_scheduler(value: Any) -> Any:
    """What `as_scheduler` takes, as far as it can be read without the config of a scheduler before: a class's name,
    None for none, or the scheduler.

    Raises:
        TypeError, ValueError: as `as_scheduler`.
    """
    name = getattr(value, "__name__", value)
    return value if name is None or (isinstance(name, str) and name in FAMILIES) else as_scheduler(value)


def as_module(name: str, value: Any, kind: type[M]) -> M:
    """A network with values.

    Raises:
        TypeError: it is something else, or has none.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name}={type(value).__name__} should be a {kind.__name__} of another pipeline (pipe.models.{name})"
        )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} has no values; fill it from a checkpoint, or take another pipeline's")
    return value
